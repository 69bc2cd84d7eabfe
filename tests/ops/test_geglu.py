from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate = (torch.randn(shape, generator=generator) * 4).to(dtype)
    return gate, torch.randn(shape, generator=generator).to(dtype)


def check(gate, up):
    assert_close_to_float64(
        ops.geglu(gate, up),
        reference.geglu(gate, up),
        reference.geglu(gate.double(), up.double()),
    )


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64_for_any_shape_and_dtype(shape, dtype):
    check(*make(tuple(shape), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [9216, 14336, 36864])
def test_matches_float64_at_the_published_sizes(dtype, width):
    check(*make((3, width), dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_one_row_is_shared_among_threads_without_a_trace(threads):
    torch.set_num_threads(threads)
    check(*make((2, 50001), torch.float32))


def test_far_negative_gates_close_without_cancellation():
    gate = torch.linspace(-5.5, -3, 1000)
    out = ops.geglu(gate, torch.ones_like(gate))
    wide = gate.double()
    inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    exact = wide / (1 + torch.exp(-2 * inner))
    assert ((out - exact) / exact).abs().max() < 1e-5
    assert (out != 0).all()


def test_limits():
    gate = torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 3e38, torch.inf, torch.nan])
    out = ops.geglu(gate, torch.ones_like(gate))
    assert out[:7].tolist() == [0, 0, 0, 0, 100.0, gate[5].item(), torch.inf]
    assert out[7].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_equals_contiguous(dtype):
    both, _ = make((7, 2 * 65), dtype)
    gate, up = both.chunk(2, dim=-1)
    expected = ops.geglu(gate.contiguous(), up.contiguous())
    assert torch.equal(ops.geglu(gate, up), expected)
    assert torch.equal(ops.geglu(gate.T, up.T), expected.T)
    assert ops.geglu(gate.T, up.T).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_autograd_through_the_reference(dtype):
    gate, up = make((3, 50), dtype)
    g = torch.randn(3, 50)
    ours = [t.clone().requires_grad_() for t in (gate, up)]
    exact = [t.double().requires_grad_() for t in (gate, up)]
    eager = [t.clone().requires_grad_() for t in (gate, up)]
    (ops.geglu(*ours) * g.to(dtype)).sum().backward()
    (reference.geglu(*exact) * g.to(dtype).double()).sum().backward()
    (reference.geglu(*eager) * g.to(dtype)).sum().backward()
    for name, a, b, c in zip(("gate", "up"), ours, eager, exact, strict=True):
        assert_close_to_float64(a.grad, b.grad, c.grad, name)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    gate, up = make((3, 40), torch.float32)
    gate.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gemma2.geglu.default, (gate, up))


BAD = [
    (lambda g, u: ops.geglu(g, u[:, :-1]), "gate has shape [3, 40], up has shape [3, 39]"),
    (lambda g, u: ops.geglu(g, u.half()), "gate is float32 and up is float16"),
    (lambda g, u: ops.geglu(g.long(), u.long()), "gate is int64: float32, bfloat16 or float16"),
    (lambda g, u: ops.geglu(g[0, 0], u[0, 0]), "gate is a scalar: [.., F] is wanted"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match="geglu") as error:
        call(*make((3, 40), torch.float32))
    assert text in str(error.value)
