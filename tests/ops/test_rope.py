from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    batch=2, q_heads=4, kv_heads=2, length=5, dim=64, dtype=torch.float32, tables=None, first=0
):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, q_heads, length, dim, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, length, dim, generator=generator).to(dtype)
    start = torch.randint(0, 8000, (batch if tables is None else tables, 1), generator=generator)
    cos, sin = ops.rope_table(start + first + torch.arange(length), dim)
    return q, k, v, cos, sin


def make_cache(k, capacity=8, dtype=None):
    shape = (*k.shape[:2], capacity, k.shape[3])
    return [torch.full(shape, 7.0, dtype=dtype or k.dtype) for _ in range(2)]


def positions(*values):
    return torch.tensor(values, dtype=torch.int64)


@given(
    batch=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (8, 8)]),
    length=st.integers(0, 6),
    half=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    one_table=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64_for_any_shape_and_dtype(batch, heads, length, half, dtype, one_table):
    q, k, _, cos, sin = make(batch, *heads, length, 2 * half, dtype, 1 if one_table else None)
    exact = reference.rope(q.double(), k.double(), cos.double(), sin.double())
    eager = reference.rope(q, k, cos, sin)
    for name, a, b, c in zip("qk", ops.rope(q, k, cos, sin), eager, exact, strict=True):
        assert_close_to_float64(a, b, c, name)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_with_heads_as_a_projection_leaves_them(dim, dtype):
    q, k, _, cos, sin = make(length=7, dim=dim, dtype=dtype)
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    rotated = ops.rope(q, k, cos, sin)
    assert all(t.is_contiguous() for t in rotated)
    exact = reference.rope(q.double(), k.double(), cos.double(), sin.double())
    for a, b, c in zip(rotated, reference.rope(q, k, cos, sin), exact, strict=True):
        assert_close_to_float64(a, b, c)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k, *_ = make(batch=1, q_heads=1, kv_heads=1, length=1, dim=64)
    scores = []
    for shift in (0, 5, 900):
        cos, sin = ops.rope_table(torch.tensor([[shift + 3, shift]]), 64)
        rotated, _ = ops.rope(q, k, cos[:, :1], sin[:, :1])
        _, keys = ops.rope(q, k, cos[:, 1:], sin[:, 1:])
        scores.append((rotated * keys).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-4)


def test_position_0_changes_nothing():
    q, k, *_ = make(length=1, dtype=torch.bfloat16)
    cos, sin = ops.rope_table(torch.zeros(2, 1, dtype=torch.int64), 64)
    assert all(torch.equal(a, b) for a, b in zip(ops.rope(q, k, cos, sin), (q, k), strict=True))


def test_halves_are_paired_not_neighbours():
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = 1.0
    cos, sin = ops.rope_table(torch.tensor([[1]]), 4)
    rotated, _ = ops.rope(x, x, cos, sin)
    torch.testing.assert_close(rotated.flatten(), torch.tensor([0.5403023, 0.0, 0.8414710, 0.0]))


def test_table_matches_transformers():
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    config = pytest.importorskip("transformers").Gemma2Config(head_dim=128)
    rope = modeling.Gemma2RotaryEmbedding(config)
    ids = torch.stack([torch.arange(0, 3000, 7), torch.arange(5000, 8000, 7)])
    cos, sin = rope(torch.zeros(2, ids.shape[1], 1), ids)
    ours = ops.rope_table(ids, 128, 10000.0)
    assert torch.equal(ours[0], cos[..., :64])
    assert torch.equal(ours[1], sin[..., :64])
    given_frequencies = ops.rope_table(ids, 128, inv_freq=rope.inv_freq)
    assert torch.equal(given_frequencies[0], ours[0])


def test_a_table_of_any_strides_equals_a_dense_one():
    q, k, _, cos, sin = make()
    expected = ops.rope(q, k, cos, sin)
    wide = torch.zeros(2, 5, 64)
    wide[..., :32] = cos
    assert torch.equal(ops.rope(q, k, wide[..., :32], sin)[0], expected[0])
    one = cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1)
    assert torch.equal(ops.rope(q, k, *one)[1], ops.rope(q, k, cos[:1], sin[:1])[1])


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_cache_rounds_the_rotated_key_once(dtype, cache_dtype):
    q, k, v, cos, sin = make(length=6, dim=48, dtype=dtype)
    caches, theirs = make_cache(k, dtype=cache_dtype), make_cache(k, dtype=cache_dtype)
    where = positions(6, -2), positions(12, 4)
    rotated = ops.rope_cache(q, k, v, cos, sin, *caches, *where)
    assert torch.equal(rotated, ops.rope(q, k, cos, sin)[0])
    eager = reference.rope_cache(q, k, v, cos, sin, *theirs, *where)
    assert rotated.dtype == eager.dtype == dtype
    assert torch.equal(caches[1], theirs[1])
    exact = make_cache(k, dtype=torch.float64)
    wide = [t.double() for t in (q, k, v, cos, sin)]
    reference.rope_cache(*wide, *exact, *where)
    assert_close_to_float64(caches[0], theirs[0], exact[0], "k_cache")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rope_cache_has_the_bits_of_rope_then_cache_write(data):
    draw = data.draw
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(DTYPES))
    q, k, v, cos, sin = make(batch, 4, 2, length, 2 * draw(st.integers(1, 40)), dtype)
    near = st.lists(st.integers(-6, 20), min_size=batch, max_size=batch)
    where = [positions(*draw(near)), positions(*draw(near))]
    if draw(st.booleans()):
        where.append(positions(*draw(near)))
    one, two = (make_cache(k, draw(st.just(7))) for _ in range(2))
    rotated = ops.rope_cache(q, k, v, cos, sin, *one, *where)
    q_rotated, k_rotated = ops.rope(q, k, cos, sin)
    ops.cache_write(*two, k_rotated, v, *where)
    assert torch.equal(rotated, q_rotated)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_rope_cache_leaves_the_other_slots_alone():
    q, k, v, cos, sin = make(batch=1)
    k_cache, v_cache = make_cache(k)
    ops.rope_cache(q, k, v, cos, sin, k_cache, v_cache, positions(6), positions(9))
    assert torch.equal(v_cache[0, :, 6:], v[0, :, :2])
    assert torch.equal(v_cache[0, :, :1], v[0, :, 2:3])
    assert (k_cache[0, :, 1:6] == 7).all()
    assert (v_cache[0, :, 1:6] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_autograd_through_the_reference(dtype):
    q, k, _, cos, sin = make(dtype=dtype)
    g_q, g_k = torch.randn_like(q), torch.randn_like(k)
    grads = []
    for run, wide in ((ops, False), (reference, False), (reference, True)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (q, k)]
        a, b = run.rope(*leaves, cos, sin)
        ((a * g_q).sum() + (b * g_k).sum()).backward()
        grads.append([t.grad for t in leaves])
    for name, ours, eager, exact in zip("qk", *grads, strict=True):
        assert_close_to_float64(ours, eager, exact, name)


def test_gradient_of_one_output_alone():
    q, k, _, cos, sin = make()
    q.requires_grad_()
    k.requires_grad_()
    ops.rope(q, k, cos, sin)[1].sum().backward()  # an expanded gradient
    assert k.grad.abs().sum() > 0
    assert q.grad is None or q.grad.abs().sum() == 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    q, k, v, cos, sin = make()
    if not requires_grad:
        args = (q, k, v, cos, sin, *make_cache(k), positions(1, 2), positions(6, 7))
        torch.library.opcheck(torch.ops.gemma2.rope_cache.default, args)
        torch.library.opcheck(torch.ops.gemma2.rope_cache.default, (*args, positions(0, 0)))
    q.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.gemma2.rope.default, (q, k, cos, sin))


def call(q, k, v, cos, sin, caches=None, q_start=None):
    k_cache, v_cache = caches or make_cache(make()[1])
    start = positions(0, 0) if q_start is None else q_start
    ops.rope_cache(q, k, v, cos, sin, k_cache, v_cache, start, positions(5, 5))


BAD = [
    (
        lambda q, k, v, c, s: ops.rope(q[0], k, c, s),
        "q has shape [4, 5, 64]: [B, Hq, S, D] is wanted",
    ),
    (
        lambda q, k, v, c, s: ops.rope(q, k[:, :, :4], c, s),
        "q has shape [2, 4, 5, 64], k has shape [2, 2, 4, 64]",
    ),
    (lambda q, k, v, c, s: ops.rope(q, k.half(), c, s), "q is float32 and k is float16"),
    (lambda q, k, v, c, s: ops.rope(q.double(), k.double(), c, s), "q is float64"),
    (lambda q, k, v, c, s: ops.rope(q, k, c.half(), s), "cos is float16: float32 is wanted"),
    (
        lambda q, k, v, c, s: ops.rope(q, k, c, s[:, :4]),
        "sin has shape [2, 4, 32], q has shape [2, 4, 5, 64]",
    ),
    (
        lambda q, k, v, c, s: ops.rope(q, k, c[:1], s),
        "cos has shape [1, 5, 32], sin has shape [2, 5, 32]",
    ),
    (
        lambda q, k, v, c, s: ops.rope(q[..., :63], k[..., :63], c, s),
        "head_dim is 63: an even number",
    ),
    (
        lambda q, k, v, c, s: ops.rope(q[..., ::2], k[..., ::2], c, s),
        "q has stride 2 in its last dimension",
    ),
    (
        lambda q, k, v, c, s: call(q, k, v[:, :1], c, s),
        "k has shape [2, 2, 5, 64], v has shape [2, 1, 5, 64]",
    ),
    (
        lambda q, k, v, c, s: call(q[:1], k, v, c, s),
        "q has shape [1, 4, 5, 64], k has shape [2, 2, 5, 64]",
    ),
    (lambda q, k, v, c, s: call(q, k, v, c[:, :4], s), "cos has shape [2, 4, 32]"),
    (
        lambda q, k, v, c, s: call(q, k, v, c, s, make_cache(k[:, :1])),
        "k_cache has shape [2, 1, 8, 64]",
    ),
    (
        lambda q, k, v, c, s: call(q, k, v, c, s, q_start=positions(0)),
        "q_start has shape [1]: [B] = [2]",
    ),
    (
        lambda q, k, v, c, s: ops.rope_table(positions(0)[None], 63),
        "head_dim is 63: an even positive number",
    ),
    (
        lambda q, k, v, c, s: ops.rope_table(positions(0)[None], 64, inv_freq=torch.ones(31)),
        "inv_freq has shape [31]: [D/2] = [32] is wanted",
    ),
]


@pytest.mark.parametrize(("run", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(run, text):
    with pytest.raises(ValueError, match="rope") as error:
        run(*make())
    assert text in str(error.value)


def test_a_bad_table_is_found_before_the_cache_is_touched():
    q, k, v, cos, sin = make()
    caches = make_cache(k)
    with pytest.raises(ValueError, match="sin has shape"):
        call(q, k, v, cos, sin[:, :4], caches)
    assert all((t == 7).all() for t in caches)


@pytest.mark.parametrize("which", range(3))
def test_rope_cache_refuses_a_gradient_unless_grad_mode_is_off(which):
    tensors = list(make())
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"rope_cache: {'qkv'[which]} requires grad"):
        call(*tensors)
    with torch.no_grad():
        call(*tensors)
