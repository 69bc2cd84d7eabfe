from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch=2, heads=3, length=5, dim=32, capacity=8, dtype=torch.float32, cache_dtype=None):
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, batch, heads, length, dim, generator=generator).to(dtype)
    k_cache, v_cache = torch.randn(2, batch, heads, capacity, dim, generator=generator).to(
        cache_dtype or dtype
    )
    return k_cache, v_cache, k, v


def positions(*values):
    return torch.tensor(values, dtype=torch.int64)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_matches_the_reference_for_any_positions_capacity_and_dtype(data):
    draw = data.draw
    batch, length, capacity = (
        draw(st.integers(0, 3)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 7)),
    )
    dtype, cache_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    tensors = make(
        batch,
        draw(st.integers(1, 3)),
        length,
        draw(st.integers(1, 40)),
        capacity,
        dtype,
        cache_dtype,
    )
    near = st.lists(st.integers(-6, 20), min_size=batch, max_size=batch)
    q_start, kv_len = positions(*draw(near)), positions(*draw(near))
    k_base = positions(*draw(near)) if draw(st.booleans()) else None
    ours, theirs = ([t.clone() for t in tensors[:2]] for _ in range(2))
    ops.cache_write(*ours, *tensors[2:], q_start, kv_len, k_base)
    reference.cache_write(*theirs, *tensors[2:], q_start, kv_len, k_base)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_position_p_goes_to_slot_p_modulo_the_capacity():
    k_cache, v_cache, k, v = make(batch=1)
    before = k_cache.clone()
    ops.cache_write(k_cache, v_cache, k, v, positions(6), positions(11))
    for s, slot in enumerate([6, 7, 0, 1, 2]):
        assert torch.equal(k_cache[0, :, slot], k[0, :, s])
        assert torch.equal(v_cache[0, :, slot], v[0, :, s])
    assert torch.equal(k_cache[0, :, 3:6], before[0, :, 3:6])


def test_pads_on_either_side_are_never_written():
    k_cache, v_cache, k, v = make()
    before = k_cache.clone()
    ops.cache_write(k_cache, v_cache, k, v, positions(-2, 0), positions(3, 1))
    assert torch.equal(k_cache[0, :, :3], k[0, :, 2:])
    assert torch.equal(k_cache[1, :, :1], k[1, :, :1])
    assert torch.equal(k_cache[0, :, 3:], before[0, :, 3:])
    assert torch.equal(k_cache[1, :, 1:], before[1, :, 1:])


def test_of_a_call_longer_than_the_ring_the_last_positions_stay():
    k_cache, v_cache, k, v = make(batch=1, length=20)
    ops.cache_write(k_cache, v_cache, k, v, positions(0), positions(19))
    for p in range(11, 19):
        assert torch.equal(k_cache[0, :, p % 8], k[0, :, p])


def test_k_base_is_the_position_of_slot_0_and_nothing_before_it_is_written():
    k_cache, v_cache, k, v = make(batch=1)
    before = k_cache.clone()
    ops.cache_write(k_cache, v_cache, k, v, positions(126), positions(131), positions(128))
    assert torch.equal(k_cache[0, :, :3], k[0, :, 2:])
    assert torch.equal(k_cache[0, :, 3:], before[0, :, 3:])


def test_extreme_positions_write_nothing():
    lowest, highest = -(2**62), 2**62
    k_cache, v_cache, k, v = make(batch=1)
    before = k_cache.clone()
    for q_start, kv_len in (
        (lowest, 5),
        (highest, 5),
        (0, lowest),
        (lowest, lowest),
        (lowest, highest),
    ):
        ops.cache_write(k_cache, v_cache, k, v, positions(q_start), positions(kv_len))
    assert torch.equal(k_cache, before)


@pytest.mark.parametrize("number", [-(2**63), -(2**62) - 1, 2**62 + 1, 2**63 - 1])
@pytest.mark.parametrize("name", ["q_start", "kv_len", "k_base"])
def test_positions_that_sums_could_overflow_are_refused(name, number):
    k_cache, v_cache, k, v = make(batch=1)
    where = {"q_start": 0, "kv_len": 5, "k_base": 0, name: number}
    with pytest.raises(ValueError, match=f"cache_write: {name} holds {number}: numbers from"):
        ops.cache_write(k_cache, v_cache, k, v, *map(positions, where.values()))


def test_strided_caches_and_keys_equal_contiguous_ones():
    k_cache, v_cache, k, v = make(length=6, dim=32)
    where = positions(3, 1), positions(9, 6)
    expected = k_cache.clone()
    ops.cache_write(expected, v_cache.clone(), k, v, *where)

    big = torch.zeros(2, 8, 5, 64)
    view = big[:, :, 1:4, 8:40].transpose(1, 2)  # [B, H, C, D] inside [B, C, H', D']
    view.copy_(k_cache)
    keys = k.transpose(1, 2).contiguous().transpose(1, 2)
    ops.cache_write(view, v_cache, keys, v[..., :], *where)
    assert torch.equal(view, expected)
    assert big[:, :, 0].abs().sum() == big[..., :8].abs().sum() == big[..., 40:].abs().sum() == 0


def test_opcheck():
    args = (*make(), positions(3, 5), positions(8, 9))
    torch.library.opcheck(torch.ops.gemma2.cache_write.default, args)
    torch.library.opcheck(torch.ops.gemma2.cache_write.default, (*args, positions(0, 1)))


def call(k_cache, v_cache, k, v, q_start=None, kv_len=None, k_base=None):
    start = positions(0, 0) if q_start is None else q_start
    ops.cache_write(
        k_cache, v_cache, k, v, start, positions(5, 5) if kv_len is None else kv_len, k_base
    )


BAD = [
    (
        lambda K, V, k, v: call(K, V, k, v[:, :2]),
        "k has shape [2, 3, 5, 32], v has shape [2, 2, 5, 32]",
    ),
    (lambda K, V, k, v: call(K, V, k, v.half()), "k is float32 and v is float16"),
    (lambda K, V, k, v: call(K, V.half(), k, v), "k_cache is float32 and v_cache is float16"),
    (
        lambda K, V, k, v: call(K[:1], V, k, v),
        "k_cache has shape [1, 3, 8, 32], k has shape [2, 3, 5, 32]",
    ),
    (lambda K, V, k, v: call(K, V[:, :, :7], k, v), "k_cache has 8 slots, v_cache has 7"),
    (
        lambda K, V, k, v: call(K[0], V, k, v),
        "k_cache has shape [3, 8, 32]: [B, Hkv, C, D] is wanted",
    ),
    (lambda K, V, k, v: call(K, V, k[0], v[0]), "k has shape [3, 5, 32]: [B, Hkv, S, D] is wanted"),
    (lambda K, V, k, v: call(K.double(), V.double(), k, v), "k_cache is float64"),
    (lambda K, V, k, v: call(K.long(), V.long(), k, v), "k_cache is int64"),
    (
        lambda K, V, k, v: call(K[..., ::2], V[..., ::2], k[..., :16], v[..., :16]),
        "k_cache has stride 2",
    ),
    (
        lambda K, V, k, v: call(K, V, k[..., ::2], v[..., ::2]),
        "k has stride 2 in its last dimension",
    ),
    (lambda K, V, k, v: call(K[:1].expand_as(V), V, k, v), "k_cache is expanded in dimension 0"),
    (lambda K, V, k, v: call(K, V, k, v, q_start=positions(0)), "q_start has shape [1]: [B] = [2]"),
    (lambda K, V, k, v: call(K, V, k, v, kv_len=positions(0, 0).int()), "kv_len is int32: int64"),
    (lambda K, V, k, v: call(K, V, k, v, k_base=positions(0, 0, 0)), "k_base has shape [3]"),
]


@pytest.mark.parametrize(("run", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named_and_nothing_is_written(run, text):
    tensors = make()
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match="cache_write") as error:
        run(*tensors)
    assert text in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("which", range(4))
def test_a_gradient_is_refused_unless_grad_mode_is_off(which):
    tensors = list(make())
    tensors[which].requires_grad_()
    name = ("k_cache", "v_cache", "k", "v")[which]
    with pytest.raises(RuntimeError, match=f"cache_write: {name} requires grad"):
        call(*tensors)
    with torch.no_grad():
        call(*tensors)
    assert torch.equal(tensors[0][:, :, :5], tensors[2])
