from __future__ import annotations

import importlib
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import reference
from gemma2.ops import attention
from tests.ops.tolerance import assert_close_to_float64

MODULE = importlib.import_module("gemma2.ops.attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A score near 50 has an ulp of 4e-6 in float32, which enters p and lse as it is. Many rows average that out
# against eager torch, which has it too; in a few rows, and in the largest error of an lse, it is luck.
FEW_ROWS = 8e-6


def make(
    B=1, Hq=2, Hkv=1, Sq=1, C=64, D=64, *, dtype=torch.float32, kv_dtype=None, q_scale=8.0, seed=0
):
    """Random q [B, Hq, Sq, D], k, v [B, Hkv, C, D]; raw scores reach several times a cap of 50."""
    g = torch.Generator().manual_seed(seed)
    q = (torch.randn(B, Hq, Sq, D, generator=g) * q_scale).to(dtype)
    k, v = (torch.randn(B, Hkv, C, D, generator=g).to(kv_dtype or dtype) for _ in range(2))
    return q, k, v


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def options(D, softcap=50.0, window=0):
    return {"scale": 3 * D**-0.5, "softcap": softcap, "window": window}


def doubles(args):
    return [a.double() if a is not None and a.is_floating_point() else a for a in args]


def eager(q, k, v, q_start, kv_len, kv_start=None, k_base=None, *, scale, softcap=0.0, window=0):
    """As transformers' eager attention: products and cap in the dtype, softmax in float32."""
    seen = reference.visible(q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, window)[
        :, None
    ]
    k, v = (x.to(q.dtype).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    dead = ~seen.any(2)[..., None]
    scores = q @ k.masked_fill(dead, 0.0).transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~seen, -math.inf)
    p = torch.softmax(scores, -1).nan_to_num(0.0).to(q.dtype)
    return p @ v.masked_fill(dead, 0.0), torch.logsumexp(scores, -1)


def check(args, kw, floor=0.0, both=True):
    """Ours, plain and deterministic, against float64, as exact as eager; gives our out."""
    exact_out, _ = reference.attention(*doubles(args), **kw)
    exact_lse = exact_log_sum_exp(args, kw)
    eager_out, eager_lse = eager(*args, **kw)
    for deterministic in (True, False) if both else (False,):
        out, lse = attention(*args, **kw, deterministic=deterministic)
        assert out.shape == args[0].shape
        assert out.dtype == args[0].dtype
        assert lse.dtype == torch.float32
        assert_close_to_float64(out, eager_out, exact_out, "out", floor)
        assert_close_to_float64(lse, eager_lse, exact_lse, "lse", FEW_ROWS)
    return out


def exact_log_sum_exp(args, kw):
    q, k, _, q_start, kv_len, kv_start, k_base = [*args, None, None][:7]
    seen = reference.visible(
        q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, kw["window"]
    )[:, None]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.transpose(2, 3) * kw["scale"]
    if kw["softcap"] > 0:
        s = kw["softcap"] * torch.tanh(s / kw["softcap"])
    return torch.logsumexp(s.masked_fill(~seen, -math.inf), -1)


def poison(args, window):
    """NaN in every slot that no query sees."""
    q, k, v, q_start, kv_len, kv_start, k_base = args
    seen = reference.visible(q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, window)
    dead = ~seen.any(1)[:, None, :, None]
    return [q, k.masked_fill(dead, math.nan), v.masked_fill(dead, math.nan), *args[3:]]


# ---- Accuracy ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("softcap", [50.0, 0.0, 5.0, 100.0])
def test_prefill_matches_float64_as_well_as_eager(dtype, D, softcap):
    q, k, v = make(1, 4, 2, 130, 130, D, dtype=dtype)
    check((q, k, v, ints(0), ints(130)), options(D, softcap))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_scale", [0.1, 1.0, 30.0])
def test_small_and_saturated_scores_match_float64_as_well_as_eager(dtype, q_scale):
    q, k, v = make(1, 4, 2, 96, 700, 256, dtype=dtype, q_scale=q_scale)
    check((q, k, v, ints(604), ints(700)), options(256))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 4), (4, 2), (3, 1), (4, 1), (8, 1)])
def test_decode_matches_float64_as_well_as_eager(dtype, Hq, Hkv):
    B = 16
    q, k, v = make(B, Hq, Hkv, 1, 600, 128, dtype=dtype)
    lengths = torch.arange(600 - B, 600)
    check((q, k, v, lengths - 1, lengths), options(128), FEW_ROWS, both=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cap_is_there(dtype):
    """Raw scores reach several caps, so an uncapped backend is far off."""
    q, k, v = make(1, 8, 4, 70, 70, 256, dtype=dtype)
    q = 2 * q
    raw = q.float() @ k.float().repeat_interleave(2, 1).transpose(2, 3) * options(256)["scale"]
    assert raw.abs().max() > 100
    out = check((q, k, v, ints(0), ints(70)), options(256))
    uncapped, _ = reference.attention(q, k, v, ints(0), ints(70), **options(256, softcap=0.0))
    assert (out.float() - uncapped.float()).abs().max() > 0.5
    assert (out.float() - uncapped.float()).abs().mean() > 0.01


def test_scores_at_both_ends_of_the_cap_need_no_maximum():
    """+-50 everywhere: a row may hold exp(-50) alone, or a million times exp(50) beside it."""
    D, C = 64, 640
    q = torch.full((1, 1, 1, D), 100.0)
    k = torch.full((1, 1, C, D), 100.0)
    v = torch.randn(1, 1, C, D, generator=torch.Generator().manual_seed(0))
    for sign in (1.0, -1.0):
        out, lse = attention(q, k * sign, v, ints(C - 1), ints(C), scale=1.0, softcap=50.0)
        torch.testing.assert_close(out[0, 0, 0], v[0, 0].mean(0), rtol=0, atol=1e-6)
        assert lse.item() == pytest.approx(sign * 50 + math.log(C), abs=1e-5)


@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("Sq", [1, 80])
def test_a_cache_of_another_dtype_is_widened(q_dtype, kv_dtype, Sq):
    q, k, v = make(2, 4, 2, Sq, 200, 64, dtype=q_dtype, kv_dtype=kv_dtype)
    args = (q, k, v, ints(200 - Sq, 150 - Sq), ints(200, 150))
    wide = (q, k.float(), v.float(), *args[3:])
    out, _ = attention(*args, **options(64))
    exact, _ = reference.attention(*doubles(args), **options(64))
    eager_out, _ = eager(*(wide if q_dtype == torch.float32 else args), **options(64))
    assert_close_to_float64(out, eager_out, exact, floor=FEW_ROWS)


# ---- Who sees whom ----


@st.composite
def cases(draw):
    B = draw(st.integers(0, 3))
    Hkv = draw(st.integers(1, 2))
    group = draw(st.sampled_from([1, 2, 3, 4, 8]))
    D = draw(st.sampled_from([64, 128, 256]))
    dtype, kv_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([*DTYPES, None]))
    window = draw(st.sampled_from([0, 0, 1, 5, 64, 100]))
    softcap = draw(st.sampled_from([0.0, 5.0, 50.0, 50.0, 100.0]))
    Sq = draw(st.sampled_from([0, 1, 1, 2, 4, 9, 65, 131]))
    lengths = [draw(st.integers(0, 700)) for _ in range(B)]
    kind = draw(st.sampled_from(["ring", "full", "linear"]))
    C = (
        draw(st.integers(20, 300))
        if kind == "ring"
        else max([1, *lengths]) + draw(st.integers(0, 9))
    )
    kv_len = torch.tensor(lengths, dtype=torch.int64)
    shifts = [draw(st.sampled_from([0, 0, 3, -2])) for _ in range(B)]
    q_start = kv_len - Sq + torch.tensor(shifts, dtype=torch.int64)
    k_base = None
    if kind == "linear":
        k_base = torch.tensor([draw(st.integers(0, n)) for n in lengths], dtype=torch.int64)
    kv_start = None
    if draw(st.booleans()):
        kv_start = ((q_start[:, None] + torch.arange(Sq)) // 37 * 37).clamp(min=0)
    q, k, v = make(B, group * Hkv, Hkv, Sq, C, D, dtype=dtype, kv_dtype=kv_dtype, seed=C + Sq)
    return (q, k, v, q_start, kv_len, kv_start, k_base), options(D, softcap, window)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_shape_ring_window_document_and_padding_matches_the_reference(case):
    """With NaN in every slot that no query sees."""
    args, kw = case
    args = poison(args, kw["window"])
    exact, exact_lse = reference.attention(*doubles(args), **kw)
    eager_out, _ = eager(*args, **kw)
    for deterministic in (False, True):
        out, lse = attention(*args, **kw, deterministic=deterministic)
        assert_close_to_float64(out, eager_out, exact, "out", 2 * FEW_ROWS)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=6e-5)


W = 70


@pytest.mark.parametrize("length", [W - 1, W, W + 1, 2 * W + 3])
@pytest.mark.parametrize("Sq", [1, 3, None])
@pytest.mark.parametrize("capacity", [128, 75])
def test_window_counts_the_token_itself_on_a_ring(length, Sq, capacity):
    """The ring gives what the whole sequence gives; 75 slots make tiles straddle the wrap."""
    Sq = Sq or min(length, capacity - W + 1)
    q, k, v = make(1, 4, 2, Sq, length, 64)
    ring_k, ring_v = torch.full((2, 1, 2, capacity, 64), math.nan)
    for p in range(max(0, length - capacity), length):
        ring_k[:, :, p % capacity] = k[:, :, p]
        ring_v[:, :, p % capacity] = v[:, :, p]
    kw = options(64, window=W)
    out, lse = attention(q, ring_k, ring_v, ints(length - Sq), ints(length), **kw)
    whole, whole_lse = attention(q, k, v, ints(length - Sq), ints(length), **kw)
    assert torch.equal(out, whole)
    assert torch.equal(lse, whole_lse)
    p = torch.arange(length - Sq, length)[:, None]
    j = torch.arange(length)
    mask = (j <= p) & (j > p - W)
    exact, _ = reference.attention(
        *doubles((q, k, v)),
        ints(0),
        ints(length),
        scale=kw["scale"],
        softcap=50.0,
        mask=mask[None, None],
    )
    assert_close_to_float64(
        out, eager(q, k, v, ints(length - Sq), ints(length), **kw)[0], exact, floor=FEW_ROWS
    )


def test_a_linear_buffer_starts_at_k_base():
    q, k, v = make(2, 2, 1, 40, 300, 64)
    kw = options(64, window=100)
    whole, _ = attention(q, k, v, ints(260, 200), ints(300, 240), **kw)
    buffers = [torch.full((2, 1, 200, 64), math.nan) for _ in range(2)]
    base = ints(128, 64)
    for b in range(2):
        n = 300 - int(base[b]) if b == 0 else 240 - int(base[b])
        for buffer, x in zip(buffers, (k, v), strict=True):
            buffer[b, :, :n] = x[b, :, base[b] : base[b] + n]
    out, _ = attention(q, *buffers, ints(260, 200), ints(300, 240), k_base=base, **kw)
    assert torch.equal(out, whole)


def test_a_buffer_holds_the_last_positions_only():
    q, k, v = make(1, 2, 1, 1, 96, 64)
    out, _ = attention(q, k, v, ints(499), ints(500), **options(64))
    rolled_k, rolled_v = (x.roll(-(500 % 96), 2) for x in (k, v))
    in_order, _ = attention(q, rolled_k, rolled_v, ints(95), ints(96), **options(64))
    torch.testing.assert_close(out, in_order, rtol=0, atol=3e-5)


def test_pads_give_zero_on_the_left_and_finite_numbers_on_the_right():
    q, k, v = make(2, 2, 1, 12, 12, 64)
    k[1, :, 9:], v[1, :, 9:] = math.nan, math.nan
    out, lse = attention(q, k, v, ints(-5, 0), ints(7, 9), **options(64))
    assert (out[0, :, :5] == 0).all()
    assert (lse[0, :, :5] == -math.inf).all()
    assert out.isfinite().all()
    assert lse[0, :, 5:].isfinite().all()
    assert lse[1].isfinite().all()
    alone, _ = attention(
        q[:1, :, 5:], k[:1], v[:1], ints(0), ints(7), **options(64), deterministic=True
    )
    padded, _ = attention(q, k, v, ints(-5, 0), ints(7, 9), **options(64), deterministic=True)
    assert torch.equal(padded[0, :, 5:], alone[0])


def test_documents_do_not_see_each_other():
    q, k, v = make(1, 4, 2, 100, 100, 64)
    kv_start = torch.zeros(1, 100, dtype=torch.int64)
    kv_start[:, 37:] = 37
    kw = options(64)
    out, _ = attention(q, k, v, ints(0), ints(100), kv_start, **kw)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, :37] += 1
    v2[:, :, :37] *= -3
    changed, _ = attention(q, k2, v2, ints(0), ints(100), kv_start, **kw)
    assert torch.equal(out[:, :, 37:], changed[:, :, 37:])
    assert not torch.equal(out[:, :, :37], changed[:, :, :37])
    check((q, k, v, ints(0), ints(100), kv_start, None), kw, FEW_ROWS)


def test_nan_that_a_query_sees_is_not_hidden():
    q, k, v = make(1, 2, 1, 1, 40, 64)
    k[0, 0, 3, 5] = math.nan
    for softcap in (0.0, 50.0):
        out, lse = attention(q, k, v, ints(39), ints(40), **options(64, softcap))
        assert out.isnan().all()
        assert lse.isnan().all()


# ---- Layout ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Sq", [1, 50])
def test_strided_views_equal_contiguous(dtype, Sq):
    q, k, v = make(2, 4, 2, Sq, 150, 64, dtype=dtype)
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    k_view = torch.cat([k, k], -1)[..., 64:].transpose(0, 1).contiguous().transpose(0, 1)
    v_view = torch.stack([v, v], 3).flatten(2, 3)[:, :, ::2]
    positions = (ints(150 - Sq, 120 - Sq), ints(150, 120))
    ours = attention(q_view, k_view, v_view, *positions, **options(64))
    assert all(map(torch.equal, ours, attention(q, k, v, *positions, **options(64))))


def test_empty_batches_queries_and_caches():
    for B, Sq, C in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        q, k, v = make(B, 2, 1, Sq, C, 64)
        zeros = torch.zeros(B, dtype=torch.int64)
        out, lse = attention(q, k, v, zeros, zeros, **options(64))
        assert out.shape == (B, 2, Sq, 64)
        assert (out == 0).all()
        assert (lse == -math.inf).all()


def test_the_first_token_gets_its_own_value():
    q, k, v = make(1, 2, 1, 1, 1, 64)
    out, _ = attention(q, k, v, ints(0), ints(1), **options(64))
    torch.testing.assert_close(out, v.expand_as(out), rtol=3e-7, atol=0)


def test_other_head_dims_use_the_reference_and_say_so_once():
    q, k, v = make(1, 2, 1, 3, 10, 48)
    MODULE._warned.clear()
    with pytest.warns(UserWarning, match="head_dim 48 has no kernel"):
        out, _ = attention(q, k, v, ints(7), ints(10), **options(48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, k, v, ints(7), ints(10), **options(48))
    torch.testing.assert_close(
        out, reference.attention(q, k, v, ints(7), ints(10), **options(48))[0]
    )


# ---- The same bits ----


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [50.0, 0.0])
@pytest.mark.parametrize("window", [0, 300])
def test_deterministic_bits_depend_on_nothing_but_the_row(dtype, softcap, window, threads):
    """Not on batch, padding, chunking, buffer or threads."""
    length, D = 1100, 64
    q, k, v = make(1, 4, 2, length, length, D, dtype=dtype)
    kw = {**options(D, softcap, window), "deterministic": True}
    whole, whole_lse = attention(q, k, v, ints(0), ints(length), **kw)
    threads(1)
    assert torch.equal(attention(q, k, v, ints(0), ints(length), **kw)[0], whole)
    threads(2)
    for first, n in ((0, 37), (37, 200), (1099, 1), (700, 5)):
        at = slice(first, first + n)
        out, lse = attention(q[:, :, at], k, v, ints(first), ints(first + n), **kw)
        assert torch.equal(out, whole[:, :, at]), (first, n)
        assert torch.equal(lse, whole_lse[:, :, at]), (first, n)
    # In a batch, left padded by 13, beside another row.
    other = make(1, 4, 2, length, length, D, dtype=dtype, seed=1)
    padded = torch.cat([q.new_zeros(1, 4, 13, D), q[:, :, :200]], 2)
    batch = [
        torch.cat(pair)
        for pair in zip((padded, k, v), (other[0][:, :, :213], *other[1:]), strict=True)
    ]
    out, _ = attention(*batch, ints(-13, 0), ints(200, 213), **kw)
    assert torch.equal(out[0, :, 13:], whole[0, :, :200])
    # From a linear buffer.
    if window:
        base = 640
        out, _ = attention(
            q[:, :, 1000:],
            k[:, :, base:],
            v[:, :, base:],
            ints(1000),
            ints(length),
            None,
            ints(base),
            **kw,
        )
        assert torch.equal(out, whole[:, :, 1000:])


@pytest.mark.parametrize("Sq", [1, 2, 90])
def test_threads_never_change_bits(Sq, threads):
    q, k, v = make(2, 4, 2, Sq, 3000, 128, dtype=torch.bfloat16)
    args = (q, k, v, ints(3000 - Sq, 1777 - Sq), ints(3000, 1777))
    threads(1)
    one = attention(*args, **options(128))
    threads(2)
    for _ in range(3):
        assert all(map(torch.equal, attention(*args, **options(128)), one))


# ---- Gradients ----


def gradients(run, args, kw, weights):
    """Of out and of the finite part of lse, by q, k, v."""
    leaves = [a.clone().requires_grad_() for a in args[:3]]
    out, lse = run(*leaves, *args[3:], **kw)
    finite = torch.where(lse > -math.inf, lse, 0.0)
    loss = (out * weights[0].to(out.dtype)).sum() + (finite * weights[1].to(lse.dtype)).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("softcap", [50.0, 0.0])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_gradients_match_float64_autograd(softcap, pieces, group, monkeypatch):
    """Two rows: one left padded with documents and a window, one right padded; in one piece and in many."""
    if pieces:
        monkeypatch.setattr(MODULE, "_BACKWARD_ELEMENTS", 500)
    q, k, v = make(2, 2 * group, 2, 21, 40, 64, q_scale=2.0)
    kv_start = torch.zeros(2, 21, dtype=torch.int64)
    kv_start[0, 11:] = 7
    args = (q, k, v, ints(-4, 10), ints(17, 27), kv_start, ints(0, 5))
    kw = options(64, softcap, window=9)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(q.shape, generator=g), torch.randn(q.shape[:3], generator=g)
    ours = gradients(attention, args, kw, weights)
    exact = gradients(reference.attention, doubles(args), kw, weights)
    for name, a, b in zip("qkv", ours, exact, strict=True):
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=1e-4,
            atol=1e-5 * b.abs().max().item(),
            msg=lambda m, n=name: f"d{n}: {m}",
        )
    assert (ours[0][0, :, :4] == 0).all()  # pads


def test_gradients_ignore_slots_that_nobody_sees():
    q, k, v = make(1, 2, 1, 5, 30, 64)
    args = (q, k, v, ints(15), ints(20), None, None)
    weights = torch.ones(q.shape), torch.ones(q.shape[:3])
    clean = gradients(attention, args, options(64), weights)
    dirty = gradients(attention, poison(args, 0), options(64), weights)
    assert all(map(torch.equal, clean, dirty))
    assert (dirty[1][:, :, 20:] == 0).all()


@pytest.mark.parametrize("use", ["out", "lse"])
def test_gradient_of_one_output_alone(use):
    q, k, v = make(1, 2, 1, 4, 20, 64, q_scale=1.0)
    weights = torch.full(q.shape, float(use == "out")), torch.full(q.shape[:3], float(use == "lse"))
    args = (q, k, v, ints(16), ints(20))
    exact = gradients(reference.attention, doubles(args), options(64), weights)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, *args[3:], **options(64))
    got = torch.autograd.grad((out if use == "out" else lse).sum(), leaves)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_tensors(dtype):
    q, k, v = make(1, 2, 1, 9, 9, 64, dtype=dtype, kv_dtype=torch.float32, q_scale=1.0)
    weights = torch.ones(q.shape), torch.ones(q.shape[:3])
    got = gradients(attention, (q, k, v, ints(0), ints(9)), options(64), weights)
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32]
    assert all(g.isfinite().all() for g in got)


# ---- The operator ----


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(requires_grad, optional):
    q, k, v = make(2, 4, 2, 5, 24, 64, q_scale=1.0)
    for t in (q, k, v):
        t.requires_grad_(requires_grad)
    args = [q, k, v, ints(10, 3), ints(15, 8)]
    if optional:
        args += [torch.zeros(2, 5, dtype=torch.int64), ints(0, 0)]
    torch.library.opcheck(torch.ops.gemma2.attention.default, tuple(args), options(64, window=7))


def test_opcheck_of_the_backward():
    q, k, v = make(2, 4, 2, 5, 24, 64, q_scale=1.0)
    args = (torch.randn(q.shape), torch.randn(q.shape[:3]), q, k, v, ints(10, 3), ints(15, 8))
    torch.library.opcheck(torch.ops.gemma2.attention_backward.default, args, options(64))


def bad(**changes):
    q, k, v = make(2, 4, 2, 5, 24, 64)
    args = {"q": q, "k": k, "v": v, "q_start": ints(0, 0), "kv_len": ints(5, 5), **options(64)}
    return attention(**{**args, **changes})


BAD = [
    (
        {"k": torch.zeros(2, 3, 24, 64), "v": torch.zeros(2, 3, 24, 64)},
        "k has 3 heads, q has 4: the number of query heads must be a multiple",
    ),
    ({"q": torch.zeros(4, 5, 64)}, "q has shape [4, 5, 64]: [B, Hq, Sq, D] is wanted"),
    ({"v": torch.zeros(2, 2, 25, 64)}, "k has shape [2, 2, 24, 64], v has shape [2, 2, 25, 64]"),
    (
        {"k": torch.zeros(1, 2, 24, 64), "v": torch.zeros(1, 2, 24, 64)},
        "k has a batch of 1, q one of 2",
    ),
    (
        {"k": torch.zeros(2, 2, 24, 128), "v": torch.zeros(2, 2, 24, 128)},
        "k has head_dim 128, q has 64",
    ),
    (
        {"q": torch.zeros(2, 4, 5, 64).double()},
        "q is float64: float32, bfloat16 or float16 is wanted",
    ),
    ({"k": torch.zeros(2, 2, 24, 64, dtype=torch.int8)}, "float32, bfloat16 or float16 is wanted"),
    ({"k": torch.zeros(2, 2, 24, 64).half()}, "k is float16 and v is float32"),
    ({"q": torch.zeros(2, 4, 64, 5).transpose(2, 3)}, "q has stride 5 in its last dimension"),
    ({"v": torch.zeros(2, 2, 64, 24).transpose(2, 3)}, "v has stride 24 in its last dimension"),
    ({"q_start": torch.zeros(2, dtype=torch.int32)}, "q_start is int32: int64 is wanted"),
    ({"q_start": ints(0)}, "q_start has shape [1]: [B] = [2] is wanted"),
    (
        {"kv_len": torch.zeros(2, 1, dtype=torch.int64)},
        "kv_len has shape [2, 1]: [B] = [2] is wanted",
    ),
    ({"kv_start": ints(0, 0)}, "kv_start has shape [2]: [B, Sq] = [2, 5] is wanted"),
    ({"k_base": torch.zeros(2)}, "k_base is float32: int64 is wanted"),
    ({"k_scale": torch.zeros(2, 2, 24)}, "k_scale is given: int8 caches are not supported yet"),
    ({"v_scale": torch.zeros(2, 2, 24)}, "v_scale is given: int8 caches are not supported yet"),
    ({"softcap": -1.0}, "softcap is -1"),
    ({"softcap": math.nan}, "softcap is nan"),
    ({"window": -4}, "window is -4"),
    ({"scale": math.inf}, "scale is inf"),
]


@pytest.mark.parametrize(("changes", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(changes, text):
    with pytest.raises(ValueError, match=r"^attention: ") as error:
        bad(**changes)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"k": torch.zeros(2, 3, 24, 48), "v": torch.zeros(2, 3, 24, 48)},
            "k has 3 heads, q has 4",
        ),
        ({"v": torch.zeros(2, 2, 25, 48)}, "v has shape [2, 2, 25, 48]"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"k_scale": torch.zeros(2, 2, 24)}, "k_scale is given"),
    ],
)
def test_bad_input_is_named_on_the_reference_path(changes, text):
    shapes = {
        "q": torch.zeros(2, 4, 5, 48),
        "k": torch.zeros(2, 2, 24, 48),
        "v": torch.zeros(2, 2, 24, 48),
    }
    with pytest.raises(ValueError, match=r"^attention: ") as error:
        bad(**{**shapes, **changes})
    assert text in str(error.value)
