from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def make(shape, dtype, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    w = (torch.randn(shape[-1], generator=generator) * 0.5).to(weight_dtype or dtype)
    return x, w


def check_rms_norm(x, w):
    assert_close_to_float64(
        ops.rms_norm(x, w, EPS),
        reference.rms_norm(x, w, EPS),
        reference.rms_norm(x.double(), w.double(), EPS),
    )


@given(
    rows=st.integers(0, 5),
    hidden=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64_for_any_shape_and_dtype(rows, hidden, dtype, weight_dtype):
    check_rms_norm(*make((rows, hidden), dtype, weight_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [2304, 3584, 4608])
def test_matches_float64_at_the_published_sizes(dtype, hidden):
    check_rms_norm(*make((2, 3, hidden), dtype))


def test_weight_zero_is_the_plain_norm_because_of_the_one():
    x, _ = make((4, 64), torch.float32)
    out = ops.rms_norm(x, torch.zeros(64), EPS)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_equals_contiguous(dtype):
    x, w = make((6, 128), dtype)
    view = x[::2, :96]
    assert torch.equal(ops.rms_norm(view, w[:96]), ops.rms_norm(view.contiguous(), w[:96]))
    transposed = x.T
    w6 = w[:6]
    assert torch.equal(ops.rms_norm(transposed, w6), ops.rms_norm(transposed.contiguous(), w6))


@pytest.mark.parametrize(
    ("residual_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("hidden", [1, 17, 2304])
def test_add_rms_norm_matches_float64(residual_dtype, dtype, hidden):
    x, post = make((3, hidden), dtype, seed=1)
    residual, pre = make((3, hidden), residual_dtype, dtype, seed=2)
    h, y = ops.add_rms_norm(residual, x, post, pre, EPS)
    h_eager, y_eager = reference.add_rms_norm(residual, x, post, pre, EPS)
    h_exact, _ = reference.add_rms_norm(
        residual.double(), x.double(), post.double(), pre.double(), EPS
    )
    assert_close_to_float64(h, h_eager, h_exact, "h")
    # y is defined on the rounded h.
    assert_close_to_float64(
        y,
        reference.rms_norm(h, pre, EPS),
        reference.rms_norm(h.double(), pre.double(), EPS),
        "y",
    )
    assert y_eager.dtype == y.dtype == dtype

    in_place = residual.clone()
    y_in_place = ops.add_rms_norm_(in_place, x, post, pre, EPS)
    assert torch.equal(in_place, h)
    assert torch.equal(y_in_place, y)


def test_gradients_match_autograd_through_the_reference():
    x, w = make((2, 5, 33), torch.float32)
    residual, pre = make((2, 5, 33), torch.float32, seed=3)
    leaves = [t.clone().requires_grad_() for t in (residual, x, w, pre)]
    exact = [t.double().requires_grad_() for t in (residual, x, w, pre)]
    g = torch.randn(2, 2, 5, 33, generator=torch.Generator().manual_seed(4))
    for run, args in ((ops, leaves), (reference, exact)):
        h, y = run.add_rms_norm(*args, EPS)
        z = run.rms_norm(h, args[2], EPS)
        ((h * g[0].to(h.dtype)).sum() + (y * g[1].to(h.dtype)).sum() + z.square().sum()).backward()
    for name, ours, theirs in zip(("residual", "x", "post", "pre"), leaves, exact, strict=True):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x, w = make((3, 40), torch.float32)
    x.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gemma2.rms_norm.default, (x, w, EPS))
    torch.library.opcheck(torch.ops.gemma2.add_rms_norm.default, (x.detach(), x, w, w, EPS))
    if not requires_grad:
        torch.library.opcheck(torch.ops.gemma2.add_rms_norm_.default, (x.clone(), x, w, w, EPS))


BAD = [
    (lambda x, w: ops.rms_norm(x, w[:-1]), "weight has shape [39], x has shape [3, 40]"),
    (lambda x, w: ops.rms_norm(x.int(), w), "x is int32: float32, bfloat16 or float16 is wanted"),
    (lambda x, w: ops.rms_norm(x.double(), w), "x is float64"),
    (lambda x, w: ops.rms_norm(x[0, 0], w), "x is a scalar"),
    (lambda x, w: ops.add_rms_norm(x[:2], x, w, w), "residual has shape [2, 40]"),
    (
        lambda x, w: ops.add_rms_norm(x, x, w, w.half()),
        "post_weight is float32 and pre_weight is float16",
    ),
    (lambda x, w: ops.add_rms_norm_(x.T.contiguous().T, x, w, w), "residual must be contiguous"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match="rms_norm") as error:
        call(*make((3, 40), torch.float32))
    assert text in str(error.value)


def test_in_place_refuses_a_gradient():
    x, w = make((3, 40), torch.float32)
    with pytest.raises(RuntimeError, match="residual requires grad"):
        ops.add_rms_norm_(x.clone().requires_grad_(), x, w, w)
