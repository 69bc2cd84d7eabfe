from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float32,
}


def make(rows, hidden, dtype, shape=(2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, hidden, generator=generator).to(dtype)
    return torch.randint(0, rows, shape, generator=generator), weight


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    hidden=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40, deadline=None)
def test_matches_float64_for_any_shape_and_dtype(shape, hidden, dtype):
    ids, weight = make(11, hidden, dtype, tuple(shape))
    out = ops.embed(ids, weight, 7.3)
    assert out.dtype == OUT[dtype]
    scale = float(torch.tensor(7.3, dtype=dtype))
    exact = weight.double()[ids] * scale
    assert_close_to_float64(out, reference.embed(ids, weight, 7.3), exact)


@pytest.mark.parametrize(
    ("dtype", "hidden", "wanted"),
    [
        (torch.bfloat16, 3584, 59.75),  # 59.8665 unrounded: what the published weights expect
        (torch.bfloat16, 2304, 48.0),
        (torch.float16, 3584, 59.875),
        (torch.float32, 3584, 59.866519927978516),
    ],
)
def test_the_scale_is_rounded_to_the_weights_dtype(dtype, hidden, wanted):
    weight = torch.ones(3, 8, dtype=dtype)
    out = ops.embed(torch.tensor([0, 2]), weight, hidden**0.5)
    assert out.unique().tolist() == [wanted]


def test_strided_table_and_ids_equal_contiguous_ones():
    ids, weight = make(20, 64, torch.bfloat16, (6, 4))
    view = weight[::2, :33]
    ids = ids % 10
    expected = ops.embed(ids.T.contiguous(), view.contiguous(), 2.0)
    assert torch.equal(ops.embed(ids.T, view, 2.0), expected)


def test_gradient_matches_autograd_through_the_reference_and_adds_up_repeated_tokens():
    ids = torch.tensor([[1, 4, 1], [1, 0, 4]])
    _, weight = make(6, 17, torch.float32)
    g = torch.randn(2, 3, 17)
    ours, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    (ops.embed(ids, ours, 3.7) * g).sum().backward()
    scale = float(torch.tensor(3.7))  # as float32 holds it
    (exact[ids] * scale * g).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
    assert ours.grad[[2, 3, 5]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_narrow_table_is_summed_wide(dtype):
    ids = torch.zeros(1000, dtype=torch.int64)
    weight = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    ops.embed(ids, weight, 1.0).sum().backward()
    assert weight.grad.dtype == dtype
    assert weight.grad[0].tolist() == [1000.0] * 3  # bfloat16 sums of ones stop at 256


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(requires_grad, dtype):
    ids, weight = make(9, 40, dtype)
    weight.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gemma2.embed.default, (ids, weight, 6.0))


BAD = [
    (lambda i, w: ops.embed(i.int(), w, 1.0), "ids is int32: int64 is wanted"),
    (lambda i, w: ops.embed(i * 0 + 9, w, 1.0), "ids holds 9 (element 0): the table has 9 rows"),
    (lambda i, w: ops.embed(i * 0 - 1, w, 1.0), "ids holds -1 (element 0)"),
    (lambda i, w: ops.embed(i, w[0], 1.0), "weight has shape [40]: [V, H] is wanted"),
    (lambda i, w: ops.embed(i, w.double(), 1.0), "weight is float64: float32, bfloat16 or float16"),
    (lambda i, w: ops.embed(i, w.T, 1.0), "weight has stride 40 in its last dimension"),
    (lambda i, w: ops.embed(i, w, float("inf")), "scale is inf: a finite float32 number is wanted"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match="embed") as error:
        call(*make(9, 40, torch.float32))
    assert text in str(error.value)
