from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

MODULE = importlib.import_module("gemma2.ops.linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kernel = torch.ops.gemma2.linear


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(m, n, k, dtype, seed=0):
    """x [m, k] and weight [n, k]."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, k, generator=g).to(dtype) for rows in (m, n)]


def make_cancelling(m, n, k, dtype):
    """The same, with products that cancel each other: what is left shows the order of summation."""
    x, weight = make(m, n, k, dtype)
    half, other = k // 2, torch.randperm(k // 2, generator=torch.Generator().manual_seed(1))
    x[:, half : 2 * half] = -x[:, other]
    weight[:, half : 2 * half] = weight[:, other]
    x[:, 2 * half :] = 0
    return x, weight


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
@pytest.mark.parametrize("m", [1, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(37, 320), (17, 8), (1, 264), (48, 2568), (33, 131)])
def test_matches_float64_around_the_few_rows_that_cuda_tells_apart(m, n, k, dtype):
    check(*make(m, n, k, dtype), floor=3e-6)


SPANS = ((0, 1), (1, 2), (7, 3), (20, 4), (31, 5), (40, 6), (47, 8), (50, 9), (61, 16), (55, 17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(300, 130, 421), (80, 72, 520), (80, 24, 2568), (80, 16, 4608)]
)
def test_a_row_does_not_depend_on_the_others(dtype, m, n, k, deterministic):
    """Bitwise, over every path that the number of rows chooses."""
    x, weight = make_cancelling(m, n, k, dtype)
    whole = ops.linear(x, weight)
    assert whole.any()
    assert torch.equal(whole, kernel(x, weight))
    for first, rows in (*SPANS, (m - 45, 45)):
        at = slice(first, first + rows)
        assert torch.equal(ops.linear(x[at], weight), whole[at]), (first, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 8, 16])
def test_a_row_does_not_depend_on_what_the_others_hold(dtype, m):
    x, weight = make(m, 40, 776, dtype)
    expected = kernel(x, weight)
    x[: m // 2] = float("nan")
    assert torch.equal(kernel(x, weight)[m // 2 :], expected[m // 2 :])


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
@pytest.mark.parametrize("m", [1, 9, 20])
@pytest.mark.parametrize(
    "first", [40, 33]
)  # rows of 16-bit numbers are aligned to 16 bytes, or not
def test_strided_rows_equal_contiguous(dtype, m, first):
    x, weight = make(2 * m, 80, 200, dtype)
    x_view, weight_view = x[::2, :160], weight[::2, first : first + 160]
    assert torch.equal(
        kernel(x_view, weight_view), kernel(x_view.contiguous(), weight_view.contiguous())
    )
    batch = x.view(m, 2, 200).transpose(0, 1)
    assert torch.equal(kernel(batch, weight), kernel(batch.contiguous(), weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 9, 20])
@pytest.mark.parametrize("k", [40, 41, 264])
def test_what_lies_between_rows_counts_for_nothing(dtype, m, k):
    x, weight = make(m, 50, k + 24, dtype)
    x[:, k:] = weight[:, k:] = float("nan")
    x_view, weight_view = x[:, :k], weight[:, :k]
    check(x_view, weight_view, floor=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 9, 16), (3, 0, 16), (3, 9, 0), (20, 9, 0), (0, 0, 0)]
)
def test_empty_dimensions_give_zeros_or_nothing(dtype, m, n, k):
    x, weight = make(m, n, k + 8, dtype)
    for cut in (Tensor.contiguous, lambda view: view):  # strides of 1 and of 8
        out = kernel(cut(x[:, :k]), cut(weight[:, :k]))
        assert out.shape == (m, n)
        assert k > 0 or (out == 0).all()


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


@pytest.mark.parametrize("shape", [(1, 64), (16, 64), (17, 64), (2, 8, 64), (3, 6, 64), (64,)])
def test_on_cuda_up_to_16_rows_of_16_bits_are_the_kernels(shape):
    """What is asked of CUDA tensors, asked of CPU tensors."""
    rows = torch.Size(shape[:-1]).numel()
    for dtype in DTYPES:
        x, weight = torch.randn(shape).to(dtype), torch.randn(9, 64).to(dtype)
        torch_leads = MODULE._torch_is_faster(x, weight, cuda=True)
        assert torch_leads == (rows > 16 or dtype == torch.float32)
        assert MODULE._torch_is_faster(x.requires_grad_(), weight, cuda=True)
        with torch.no_grad():
            assert MODULE._torch_is_faster(x, weight, cuda=True) == torch_leads


def test_on_cuda_the_kernel_complains_of_bad_input():
    x, weight = make(40, 7, 64, torch.float32)
    bad = [(x, weight[:, :-1]), (x, weight.half()), (x, weight[0]), (x.double(), weight.double())]
    assert not any(MODULE._torch_is_faster(a, b, cuda=True) for a, b in bad)


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
