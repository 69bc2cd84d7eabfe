from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

MODULE = importlib.import_module("gemma2.ops.linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kernel = torch.ops.gemma2.linear


def make(m, n, k, dtype, seed=0):
    """x [m, k] and weight [n, k]."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, k, generator=g).to(dtype) for rows in (m, n)]


def check(x, weight, run=kernel, floor=0.0):
    assert_close_to_float64(
        run(x, weight),
        F.linear(x, weight),
        reference.linear(x.double(), weight.double()),
        floor=floor,
    )


@given(
    m=st.integers(0, 40),
    n=st.integers(0, 60),
    k=st.integers(0, 400),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=80, deadline=None)
def test_matches_float64_for_any_shape(m, n, k, dtype):
    # A few sums of a few hundred products are no statistic: half an ulp of the largest partial sum.
    check(*make(m, n, k, dtype), floor=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16, 300])
@pytest.mark.parametrize(("n", "k"), [(512, 2304), (253, 1111)])
def test_matches_float64_at_layer_sizes(m, n, k, dtype):
    check(*make(m, n if m < 300 else 64, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    """Bitwise, over every path that the number of rows chooses."""
    x, weight = make(300, 130, 517, dtype)
    whole = kernel(x, weight)
    for first, rows in ((0, 1), (1, 2), (7, 3), (20, 4), (31, 5), (40, 6), (55, 17), (255, 45)):
        at = slice(first, first + rows)
        assert torch.equal(kernel(x[at], weight), whole[at]), (first, rows)


@pytest.mark.parametrize("m", [1, 70])
def test_threads_never_change_bits(m):
    before = torch.get_num_threads()
    x, weight = make(m, 777, 640, torch.bfloat16)
    try:
        torch.set_num_threads(1)
        one = kernel(x, weight)
        torch.set_num_threads(2)
        assert torch.equal(kernel(x, weight), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 9])
def test_strided_rows_equal_contiguous(dtype, m):
    x, weight = make(2 * m, 80, 200, dtype)
    x_view, weight_view = x[::2, :160], weight[::2, 40:]
    assert torch.equal(
        kernel(x_view, weight_view), kernel(x_view.contiguous(), weight_view.contiguous())
    )
    batch = x.view(m, 2, 200).transpose(0, 1)
    assert torch.equal(kernel(batch, weight), kernel(batch.contiguous(), weight))


def test_leading_dimensions_stay():
    x, weight = make(6, 10, 32, torch.float32)
    assert kernel(x.view(2, 3, 32), weight).shape == (2, 3, 10)
    assert kernel(x[0], weight).shape == (10,)
    assert torch.equal(kernel(x[0], weight), kernel(x, weight)[0])
    assert kernel(x[:0].view(0, 3, 32), weight).shape == (0, 3, 10)


def test_nan_and_infinity_come_through():
    x, weight = make(6, 10, 33, torch.bfloat16)
    x[1, 32], x[2, 3], weight[4, 0] = float("nan"), float("inf"), float("inf")
    out = kernel(x, weight)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert not out[:, 4].isfinite().any()
    assert out[[0, 3, 4, 5]][:, [0, 1, 2, 3, 5, 6, 7, 8, 9]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 100])
def test_the_face_is_right_whatever_path_it_takes(dtype, m):
    check(*make(m, 96, 256, dtype), run=ops.linear)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_mode_takes_the_kernel(dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "_TORCH_FROM_ROWS", dict.fromkeys(DTYPES, 1))
    x, weight = make(100, 96, 256, dtype)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ops.linear(x, weight), kernel(x, weight))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [kernel, ops.linear], ids=["kernel", "face"])
def test_gradients_match_float64_autograd(dtype, run):
    x, weight = make(14, 31, 48, dtype)
    x = x.view(2, 7, 48)
    g = torch.randn(2, 7, 31, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(run, x, weight, g):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(run(*leaves), leaves, g)

    ours = gradients(run, x, weight, g)
    eager = gradients(F.linear, x, weight, g)
    exact = gradients(F.linear, x.double(), weight.double(), g.double())
    for name, a, e, b in zip(("x", "weight"), ours, eager, exact, strict=True):
        assert a.dtype == dtype
        assert_close_to_float64(a, e, b, f"d{name}", floor=1e-6)


def test_only_wanted_gradients_are_made():
    x, weight = make(3, 5, 8, torch.float32)
    kernel(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (40,)])
def test_opcheck(requires_grad, shape):
    x, weight = torch.randn(shape), torch.randn(7, 40)
    x.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gemma2.linear.default, (x, weight))


BAD = [
    (lambda x, w: ops.linear(x, w[:, :-1]), "weight has shape [7, 39], x has shape [3, 40]"),
    (lambda x, w: ops.linear(x, w[0]), "weight has shape [40]: [N, K] is wanted"),
    (lambda x, w: ops.linear(x[0, 0], w), "x is a scalar: [.., K] is wanted"),
    (lambda x, w: ops.linear(x.half(), w), "x is float16 and weight is float32"),
    (lambda x, w: ops.linear(x.double(), w.double()), "x is float64"),
    (lambda x, w: ops.linear(x, w.long()), "weight is int64"),
    (lambda x, w: kernel(x[:, :7], w.T), "weight has stride 40 in its last dimension"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=r"^linear: ") as error:
        call(*make(3, 7, 40, torch.float32))
    assert text in str(error.value)
