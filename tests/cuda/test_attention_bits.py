"""Deterministic attention on CUDA: a row's bits depend on nothing but the row. Besides what the contract
tests say of batch, padding and chunking, they do not depend on where tensors lie.
"""

from __future__ import annotations

import pytest
import torch

from gemma2.ops import attention

pytestmark = pytest.mark.usefixtures("emulated")

WINDOW, LENGTH, QUERIES, DIM = 150, 420, 70, 64
FORMS = [(torch.bfloat16, 50.0), (torch.bfloat16, 0.0), (torch.float16, 50.0)]


def make(dtype, batch=1):
    g = torch.Generator().manual_seed(0)
    q = (torch.randn(batch, 4, QUERIES, DIM, generator=g) * 4).to(dtype)
    k, v = torch.randn(2, batch, 2, LENGTH, DIM, generator=g).to(dtype)
    return q, k, v


def call(q, k, v, softcap, *, length=LENGTH, deterministic=True, **more):
    at = torch.full((len(q),), length - q.shape[2]), torch.full((len(q),), length)
    kw = {"scale": 0.3, "softcap": softcap, "window": WINDOW, "deterministic": deterministic}
    return attention(q, k, v, *at, **kw, **more)


def shifted(x, by=1):
    """The same numbers, `by` elements further: not on 16 bytes."""
    copy = x.new_empty(x.numel() + 8)[by : by + x.numel()].view(x.shape)
    return copy.copy_(x)


def odd_rows(x):
    """The same numbers in rows of an odd number of elements: one in eight lies on 16 bytes."""
    return x.new_empty(*x.shape[:3], DIM + 1)[..., :DIM].copy_(x)


@pytest.mark.parametrize(("dtype", "softcap"), FORMS)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("moved", [shifted, odd_rows])
def test_bits_do_not_depend_on_alignment(emulator, dtype, softcap, which, moved):
    qkv = dict(zip("qkv", make(dtype), strict=True))
    whole = call(*qkv.values(), softcap)
    args = [moved(x) if name in which else x for name, x in qkv.items()]
    with emulator.counting() as counters:
        elsewhere = call(*args, softcap)
    assert counters["attention copy"]["launches"] == len(which)
    assert all(map(torch.equal, elsewhere, whole))


@pytest.mark.parametrize(("dtype", "softcap"), FORMS)
def test_bits_of_a_ring_are_those_of_the_whole_sequence(dtype, softcap):
    """Also of rings that have no multiple of 64 slots, so that a tile straddles their end: at 230 the
    span's first, at 300 one that is seen whole."""
    q, k, v = make(dtype)
    whole = call(q, k, v, softcap)
    for capacity in (256, 230, 300):
        rings = [torch.full((1, 2, capacity, DIM), torch.nan, dtype=dtype) for _ in range(2)]
        held = torch.arange(LENGTH - capacity, LENGTH)
        for ring, x in zip(rings, (k, v), strict=True):
            ring[:, :, held % capacity] = x[:, :, held]
        assert all(map(torch.equal, call(q, *rings, softcap), whole))
    base = LENGTH - 230  # a linear buffer
    buffer = call(q, k[:, :, base:], v[:, :, base:], softcap, k_base=torch.tensor([base]))
    assert all(map(torch.equal, buffer, whole))


@pytest.mark.parametrize(("dtype", "softcap"), FORMS)
def test_bits_are_those_of_every_query_alone(dtype, softcap):
    """Every way to cut the queries: into single ones, in threes, in a batch of other rows."""
    q, k, v = make(dtype, batch=2)
    whole, whole_lse = call(q, k, v, softcap)
    for first, n in ((0, 1), (33, 3), (69, 1)):
        part, length = q[:, :, first : first + n], LENGTH - QUERIES + first + n
        out, lse = call(part, k, v, softcap, length=length)
        assert torch.equal(out, whole[:, :, first : first + n])
        assert torch.equal(lse, whole_lse[:, :, first : first + n])
    for row in range(2):
        alone = call(q[row : row + 1], k[row : row + 1], v[row : row + 1], softcap)
        assert torch.equal(alone[0][0], whole[row])
        assert torch.equal(alone[1][0], whole_lse[row])


def test_launches_do_not_depend_on_the_length(emulator):
    """A captured graph replays them for every length that the capacity holds."""
    q, k, v = make(torch.bfloat16)
    for queries in (1, QUERIES):
        seen = []
        for length in (queries, 100, LENGTH):
            with emulator.counting() as counters:
                call(q[:, :, :queries], k, v, 50.0, length=length, deterministic=False)
            seen.append({name: (c["launches"], c["blocks"]) for name, c in counters.items()})
        assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_runs_where_a_block_has_99_kb(emulator, monkeypatch, dtype, queries):
    """At the largest head_dim: on compute capability 8.6, 8.9 and 12.0."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 256, generator=g).to(dtype) for h, n in ((4, queries), *[(2, 200)] * 2)
    )
    results = []
    for kilobytes in (228, 100):
        monkeypatch.setenv("GEMMA2_EMULATED_SHARED_KB", str(kilobytes))
        at = torch.tensor([200 - queries]), torch.tensor([200])
        results.append(attention(q, k, v, *at, scale=1 / 16, softcap=50.0))
    for ours, large in zip(*results, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, large, rtol=eps, atol=eps)  # decode is cut in other splits
