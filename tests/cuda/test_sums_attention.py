"""Deterministic attention's sums of 512 keys, made in turn or side by side: the same bits either way."""

from __future__ import annotations

import pytest
import torch

from gemma2 import ops, reference

pytestmark = pytest.mark.usefixtures("emulated")

BF16, F16 = torch.bfloat16, torch.float16
LENGTH, DIM = 1100, 64
# Of a multiprocessor: room for one block.
ONE_BLOCK_KB = {64: "30", 128: "54", 256: "100"}
IN_TURN, SIDE_BY_SIDE = {"attention_prefill"}, {"attention_prefill", "attention_merge"}


def tensors(dtype, length=LENGTH, heads=(2, 1), dim=DIM):
    g = torch.Generator().manual_seed(0)
    # Scores of all keys count: a sum that outweighs the others would hide their order.
    q = torch.randn(1, heads[0], length, dim, generator=g)
    k, v = torch.randn(2, 1, heads[1], length, dim, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.fixture
def run(emulator, monkeypatch):
    """Deterministic attention of queries [start, start + n), or of rows with starts and ends of
    their own, and the kernels that ran."""

    def run(q, k, v, start, n, softcap, window=0, multiprocessors=132, ends=None, **more):
        monkeypatch.setenv("GEMMA2_EMULATED_MULTIPROCESSORS", str(multiprocessors))
        # Sums are then made in turn.
        kilobytes = ONE_BLOCK_KB[q.shape[-1]] if multiprocessors == 1 else "228"
        monkeypatch.setenv("GEMMA2_EMULATED_SHARED_KB", kilobytes)
        options = {"scale": 0.375, "softcap": softcap, "window": window, "deterministic": True}
        if ends is None:
            q, start, ends = q[:, :, start : start + n], [start], [start + n]
        at = torch.tensor(start), torch.tensor(ends)
        with emulator.counting() as counters:
            out = ops.attention(q, k, v, *at, **options, **more)
        return *out, counters

    return run


def same(x, y):
    return all(torch.equal(a, b) for a, b in zip(x[:2], y[:2], strict=True))


@pytest.mark.parametrize(("dtype", "softcap"), [(BF16, 50.0), (BF16, 0.0), (F16, 50.0)])
@pytest.mark.parametrize("window", [0, 900])
def test_sums_in_turn_and_side_by_side_have_the_same_bits(run, dtype, softcap, window):
    q, k, v = tensors(dtype)
    for start, n in ((1099, 1), (1022, 5), (510, 64), (900, 65)):
        alone = run(q, k, v, start, n, softcap, window, multiprocessors=1)
        apart = run(q, k, v, start, n, softcap, window)
        assert set(alone[2]) == IN_TURN
        assert set(apart[2]) == SIDE_BY_SIDE
        assert same(alone, apart), (start, n)


@pytest.mark.parametrize(("dtype", "softcap"), [(BF16, 50.0), (F16, 0.0)])
@pytest.mark.parametrize("length", [511, 512, 513, 1027])
def test_few_tokens_have_the_bits_of_the_whole(run, dtype, softcap, length):
    q, k, v = tensors(dtype, length)
    whole = run(q, k, v, length - 200, 200, softcap, multiprocessors=1)
    for n in (1, 65):
        few = run(q, k, v, length - n, n, softcap)
        assert torch.equal(few[0], whole[0][:, :, -n:])
        assert torch.equal(few[1], whole[1][:, :, -n:])


@pytest.mark.parametrize(("dtype", "softcap"), [(BF16, 50.0), (F16, 0.0)])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_sums_do_not_begin_where_a_blocks_keys_begin(run, dtype, softcap, multiprocessors):
    """The last queries' keys begin in another tile than those of the queries that share their block."""
    q, k, v = tensors(dtype)
    n, few, window = 90, 6, 900
    whole = run(q, k, v, LENGTH - n, n, softcap, window, multiprocessors)
    last = run(q, k, v, LENGTH - few, few, softcap, window, multiprocessors)
    assert torch.equal(last[0], whole[0][:, :, -few:])
    assert torch.equal(last[1], whole[1][:, :, -few:])


@pytest.mark.parametrize(("dtype", "softcap", "dim"), [(BF16, 50.0, 256), (F16, 50.0, 128)])
def test_every_head_dim_has_the_same_bits_either_way(run, dtype, softcap, dim):
    q, k, v = tensors(dtype, dim=dim)
    apart = run(q, k, v, LENGTH - 3, 3, softcap)
    alone = run(q, k, v, LENGTH - 3, 3, softcap, multiprocessors=1)
    assert (set(alone[2]), set(apart[2])) == (IN_TURN, SIDE_BY_SIDE)
    assert same(alone, apart)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(("dtype", "softcap"), [(BF16, 50.0), (F16, 0.0)])
def test_a_padded_row_of_a_batch_has_the_bits_of_the_row_alone(
    run, dtype, softcap, multiprocessors
):
    """Pads of the left have negative positions, pads of the right follow the row's length."""
    n, (q, k, v) = 40, tensors(dtype)
    starts, lengths = (LENGTH - n, 500, -13, 700), (LENGTH, 540, 27, 715)
    rows = [q[:, :, LENGTH - n :].roll(i, 2) for i in range(4)]
    keys = [x.repeat(4, 1, 1, 1) for x in (k, v)]
    batch = run(
        torch.cat(rows), *keys, starts, n, softcap, multiprocessors=multiprocessors, ends=lengths
    )
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        real = slice(max(0, -start), length - start)
        alone = run(rows[i][:, :, real], k, v, [start + real.start], real.stop - real.start,
                    softcap, multiprocessors=133 - multiprocessors, ends=[length])  # fmt: skip
        assert torch.equal(batch[0][i : i + 1, :, real], alone[0]), i
        assert torch.equal(batch[1][i : i + 1, :, real], alone[1]), i


def test_a_ring_and_documents_have_the_bits_of_the_whole(run):
    q, k, v = tensors(BF16)
    ring_k, ring_v = torch.full((2, 1, 1, 1000, DIM), torch.nan, dtype=BF16)
    for p in range(LENGTH - 1000, LENGTH):
        ring_k[:, :, p % 1000], ring_v[:, :, p % 1000] = k[:, :, p], v[:, :, p]
    for multiprocessors in (1, 132):
        whole = run(q, k, v, 1090, 10, 50.0, 900)
        assert same(run(q, ring_k, ring_v, 1090, 10, 50.0, 900, multiprocessors), whole)
        kv_start = torch.full((1, 10), 150)
        begun = run(q, k, v, 1090, 10, 50.0, 900, multiprocessors, kv_start=kv_start)
        assert same(begun, run(q, k, v, 1090, 10, 50.0, 900))  # the window begins after it
        kv_start[:, 1::2] = 1030
        mixed = run(q, k, v, 1090, 10, 50.0, 900, multiprocessors, kv_start=kv_start)
        assert torch.equal(mixed[0][:, :, ::2], whole[0][:, :, ::2])
        late = run(q, k, v, 1091, 1, 50.0, 900, kv_start=torch.tensor([[1030]]))
        assert torch.equal(mixed[0][:, :, 1:2], late[0])


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("softcap", [50.0, 0.0])
def test_the_sums_make_what_float64_makes(run, multiprocessors, softcap):
    q, k, v = tensors(F16, heads=(3, 1))
    out, lse, _ = run(q, k, v, LENGTH - 3, 3, softcap, 0, multiprocessors)
    args = (q[:, :, -3:].double(), k.double(), v.double(), torch.tensor([LENGTH - 3]))
    exact = reference.attention(*args, torch.tensor([LENGTH]), scale=0.375, softcap=softcap)
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), exact[1].double(), rtol=0, atol=2e-5)


def test_side_by_side_keys_are_read_once_and_a_row_is_written_once(run):
    q, k, v = tensors(BF16)
    counters = run(q, k, v, LENGTH - 4, 4, 50.0)[2]
    read = counters["attention_prefill"]["region_read"]
    assert read["k"] == read["v"] == LENGTH * DIM * 2
    parts, rows = 4, 2 * 4
    scratch = rows * parts * 4 * (DIM + 4)
    assert counters["attention_prefill"]["region_written"] == {"scratch": scratch}
    assert counters["attention_merge"]["region_written"] == {"out": rows * DIM * 2, "lse": rows * 4}
