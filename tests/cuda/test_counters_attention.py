"""What attention's prefill reads and multiplies, counted by the emulator, beside what it must.

A block is 64 rows (query x head of a group), a warp 16 of them; keys are multiplied 16 at a time.
"""

from __future__ import annotations

import pytest
import torch

from gemma2 import ops

pytestmark = pytest.mark.usefixtures("emulated")

BF16, F16 = torch.bfloat16, torch.float16
KERNEL = "attention_prefill"


@pytest.fixture
def prefill(emulator):
    """Counters of a prefill of `length` tokens from position 0 on, laid out as a model has them."""

    def prefill(length, q_heads, kv_heads, dim, window, dtype=BF16):
        g = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, length, heads, dim, generator=g).to(dtype).transpose(1, 2)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        start, end = torch.tensor([0]), torch.tensor([length])
        with emulator.counting() as counters:
            ops.attention(q, k, v, start, end, scale=dim**-0.5, softcap=50.0, window=window)
        assert set(counters) == {KERNEL}
        assert counters[KERNEL]["launches"] == 1
        return counters[KERNEL]

    return prefill


def seen(length, window):
    """[length, length]: the query of the row sees the key of the column."""
    p, j = torch.arange(length)[:, None], torch.arange(length)
    return (j <= p) & ((j > p - window) if window else True)


def touched(mask, rows, keys):
    """How many pieces of rows x keys hold something visible."""
    height, width = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -width % keys, 0, -height % rows))
    pieces = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, keys))
    return int(pieces.any(3).any(1).sum())


@pytest.mark.parametrize("window", [128, 0])
def test_prefill_reads_the_keys_that_a_block_sees_once_and_no_others(prefill, window):
    length, group, dim = 512, 2, 64
    counters = prefill(length, 2 * group, 2, dim, window)
    mask = seen(length, window).repeat_interleave(group, 0)
    keys = touched(mask, 64, 1)
    read = counters["region_read"]
    assert read["k"] == read["v"] == 2 * keys * dim * 2
    # In whole tiles, what the hardware copies is no more than a tenth above the visible tiles.
    copied = counters["instructions"]["copy_async"]
    queries = 2 * length * group * dim // 8
    tiles = 2 * 2 * touched(mask, 64, 64) * 64 * dim // 8
    # A copy counts where it writes, and where it reads, unless it fills with zeros.
    assert copied - queries - (read["q"] + read["k"] + read["v"]) // 16 <= 1.1 * tiles
    assert read["q"] == 2 * length * group * dim * 2
    assert counters["region_written"] == {
        "out": 2 * length * group * dim * 2, "lse": 2 * length * group * 4
    }  # fmt: skip


@pytest.mark.parametrize("window", [128, 0])
def test_prefill_multiplies_what_a_warp_sees(prefill, window):
    """At most 15% more than products of 16 x 8 scores that hold something visible."""
    length, group, dim = 512, 2, 64
    counters = prefill(length, group, 1, dim, window)
    mask = seen(length, window).repeat_interleave(group, 0)
    scores = touched(mask, 16, 8) * dim // 16
    values = touched(mask, 16, 16) * dim // 8
    products = counters["instructions"]["mma_16x8x16"]
    assert scores + values <= products <= 1.15 * (scores + values)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_prefill_has_no_bank_conflicts_and_stores_whole_sectors(prefill, dim, dtype):
    counters = prefill(100, 3, 1, dim, 70, dtype)
    assert counters["shared"]["ldmatrix"]["accesses"] > 0
    assert {name: bank["conflicts"] for name, bank in counters["shared"].items()} == dict.fromkeys(
        counters["shared"], 0
    )
    written = counters["global_write"]
    lse = counters["region_written"]["lse"]
    assert written["bytes"] - lse == 100 * 3 * dim * 2
    assert 32 * written["sectors"] <= written["bytes"] - lse + 32 * lse // 4


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_prefill_reads_no_key_in_a_gap_between_documents(emulator, dtype):
    """Queries of padding between two documents see nothing, and nobody sees its keys."""
    length, gap, dim = 100, slice(40, 55), 64
    q, k, v = torch.randn(3, 1, 1, length, dim).to(dtype)
    k[:, :, gap], v[:, :, gap] = torch.nan, torch.nan
    kv_start = torch.zeros(1, length, dtype=torch.int64)
    kv_start[:, gap] = length
    kv_start[:, gap.stop :] = gap.stop
    args = (q, k, v, torch.tensor([0]), torch.tensor([length]), kv_start)
    with emulator.counting() as counters:
        out, lse = ops.attention(*args, scale=dim**-0.5, softcap=50.0)
    real = torch.ones(length, dtype=torch.bool)
    real[gap] = False
    assert out[:, :, real].isfinite().all()
    assert lse[:, :, real].isfinite().all()
    assert (out[:, :, gap] == 0).all()
    assert (lse[:, :, gap] == -torch.inf).all()
    read = counters[KERNEL]["region_read"]
    # Rows 0 to 63 see 40 keys and 9 more, the others 45 of the second document.
    assert read["k"] == read["v"] == (40 + 9 + 45) * dim * 2
