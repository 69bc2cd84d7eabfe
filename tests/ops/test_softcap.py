from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, seed=0):
    """Reaches several caps of 30, where a kernel without the cap would be far off."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 60).to(dtype)


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from(DTYPES),
    cap=st.sampled_from([1.0, 30.0, 50.0]),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64_for_any_shape_and_dtype(shape, dtype, cap):
    x = make(tuple(shape), dtype)
    assert_close_to_float64(
        ops.softcap(x, cap), reference.softcap(x, cap), reference.softcap(x.double(), cap)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_on_a_row_of_logits_and_is_far_from_the_uncapped_ones(dtype):
    x = make((2, 256000), dtype)
    out = ops.softcap(x, 30.0)
    assert_close_to_float64(out, reference.softcap(x, 30.0), reference.softcap(x.double(), 30.0))
    assert out.abs().max() <= 30
    assert (out - x).abs().max() > 100


def test_infinities_become_the_cap_and_nan_stays():
    out = ops.softcap(torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0]), 30.0)
    assert out[:2].tolist() == [-30.0, 30.0]
    assert out[2].isnan()
    assert out[3] == 0


def test_strided_input_equals_contiguous():
    x = make((6, 70), torch.bfloat16)
    assert torch.equal(ops.softcap(x.T, 30.0), ops.softcap(x, 30.0).T)
    assert torch.equal(ops.softcap(x[::2, ::3], 30.0), ops.softcap(x, 30.0)[::2, ::3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_matches_autograd_through_the_reference(dtype):
    x = make((3, 50), dtype)
    g = torch.randn(3, 50).to(dtype)
    ours, eager, exact = (t.requires_grad_() for t in (x.clone(), x.clone(), x.double()))
    (ops.softcap(ours, 30.0) * g).sum().backward()
    (reference.softcap(eager, 30.0) * g).sum().backward()
    (reference.softcap(exact, 30.0) * g.double()).sum().backward()
    assert_close_to_float64(ours.grad, eager.grad, exact.grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x = make((3, 40), torch.float32).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gemma2.softcap.default, (x, 30.0))


BAD = [
    (lambda x: ops.softcap(x, 0.0), "cap is 0: a positive finite float32 number is wanted"),
    (lambda x: ops.softcap(x, -1.0), "cap is -1: a positive finite float32 number is wanted"),
    (lambda x: ops.softcap(x, float("nan")), "cap is nan"),
    (lambda x: ops.softcap(x, float("inf")), "cap is inf"),
    (lambda x: ops.softcap(x.long(), 30.0), "x is int64: float32, bfloat16 or float16 is wanted"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match="softcap") as error:
        call(make((3, 40), torch.float32))
    assert text in str(error.value)
