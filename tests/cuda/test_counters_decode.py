"""What decode attention moves on CUDA, counted by the emulator: the group's keys and values once.

The emulated device is made small where blocks should go through many tiles of keys.
"""

from __future__ import annotations

import math

import pytest
import torch

from gemma2 import reference
from gemma2.ops import attention
from tests.cuda.emulation import Landing, Order
from tests.ops.tolerance import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("emulated")

BF16, F16 = torch.bfloat16, torch.float16
FORMS = [(BF16, 50.0), (BF16, 0.0), (F16, 50.0)]  # without a maximum, and two with one
SPLIT, COMBINE = "decode split", "decode combine"


@pytest.fixture
def multiprocessors(monkeypatch):
    """`multiprocessors(1)`: the emulated device has so many."""
    return lambda n: monkeypatch.setenv("GEMMA2_EMULATED_MULTIPROCESSORS", str(n))


def make(B, Hq, Hkv, Sq, C, D, dtype=BF16, lengths=None, seed=0):
    """q, k, v, q_start and kv_len: the last `Sq` positions ask, of rows of these lengths."""
    g = torch.Generator().manual_seed(seed)
    q = (torch.randn(B, Hq, Sq, D, generator=g) * 8).to(dtype)
    k, v = (torch.randn(B, Hkv, C, D, generator=g).to(dtype) for _ in range(2))
    kv_len = torch.tensor(lengths or [C] * B)
    return q, k, v, kv_len - Sq, kv_len


def options(D, softcap=50.0, window=0):
    return {"scale": 3 * D**-0.5, "softcap": softcap, "window": window}


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def seen_bytes(args, kw):
    """Of the keys that some query sees, and of their values."""
    q, k, _, q_start, kv_len, kv_start, k_base = [*args, None, None][:7]
    seen = reference.visible(
        q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, kw["window"]
    )
    return int(seen.any(1).sum()) * k.shape[1] * k.shape[3] * k.element_size()


def conflicts(counters):
    return {
        wrapper: bank["conflicts"]
        for kernel in counters.values()
        for wrapper, bank in kernel["shared"].items()
        if bank["conflicts"]
    }


@pytest.mark.parametrize(("dtype", "softcap"), FORMS)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("small", [True, False], ids=["one multiprocessor", "132"])
def test_keys_and_values_are_read_once_for_the_group(
    emulator, multiprocessors, dtype, softcap, D, small
):
    multiprocessors(1 if small else 132)
    args = make(1, 4, 2, 2, 300, D, dtype, [290])
    with emulator.counting() as counters:
        attention(*args, **options(D, softcap))
    split = counters[SPLIT]
    assert split["region_read"]["k"] == split["region_read"]["v"] == 2 * 290 * D * 2
    assert conflicts(counters) == {}


CASES = {
    "window": (make(1, 4, 2, 1, 300, 128), {"window": 100}),
    "ring that wraps": (make(1, 4, 2, 3, 150, 128, lengths=[444]), {"window": 97}),
    "lengths": (make(3, 4, 2, 1, 200, 128, lengths=[1, 0, 199]), {}),
    "documents": (
        (*make(1, 2, 2, 4, 90, 128, lengths=[86]), torch.tensor([[50, 90, 84, 3]])),
        {"window": 40},
    ),
    "linear buffer": (
        (*make(1, 2, 1, 2, 90, 128, lengths=[160]), None, torch.tensor([75])),
        {},
    ),
    "capacity": (make(1, 2, 1, 1, 96, 128, lengths=[500]), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("small", [True, False], ids=["one multiprocessor", "132"])
def test_only_keys_that_a_query_sees_are_read(emulator, multiprocessors, case, small):
    multiprocessors(1 if small else 132)
    args, changes = CASES[case]
    kw = {**options(128), **changes}
    with emulator.counting() as counters:
        attention(*args, **kw)
    read = counters[SPLIT]["region_read"]
    assert read["k"] == read["v"] == seen_bytes(args, kw) > 0
    assert conflicts(counters) == {}


@pytest.mark.parametrize("D", [64, 128, 256])
def test_requests_are_of_512_bytes_in_full_sectors(emulator, multiprocessors, D):
    """But for the row's numbers: its positions, which each warp reads itself."""
    multiprocessors(1)
    args = make(1, 16, 1, 1, 512, D)
    with emulator.counting() as counters:
        attention(*args, **options(D))
    split = counters[SPLIT]
    rows = sum(split["region_read"][name] for name in "qkv")
    numbers = 4 * split["blocks"] * 2  # requests for q_start and kv_len
    assert split["global_read"]["requests"] == rows // 512 + numbers
    assert split["global_read"]["sectors"] == rows // 32 + numbers
    written = split["global_write"]
    assert written["bytes"] >= 0.9 * 32 * written["sectors"]


@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_tile_of_keys_takes_two_barriers(emulator, multiprocessors, D):
    multiprocessors(1)
    tile = 32 if D == 256 else 64
    args = make(4, 2, 2, 1, 5 * tile, D)  # more sequences than run at a time
    with emulator.counting() as counters:
        attention(*args, **options(D, window=5 * tile))
    assert set(counters) <= {SPLIT, COMBINE}
    split = counters[SPLIT]
    tiles = 8 * 5
    assert 2 * tiles <= split["barriers"] <= 2 * tiles + 2 * split["blocks"]


def test_partial_sums_are_written_and_read_once(emulator, multiprocessors):
    multiprocessors(4)
    args = make(1, 4, 1, 2, 2048, 256)
    with emulator.counting() as counters:
        attention(*args, **options(256))
    splits, rows = counters[SPLIT]["blocks"], 8
    assert splits > 1
    assert counters[SPLIT]["region_written"] == {"scratch": splits * rows * (256 + 4) * 4}
    read = counters[COMBINE]["region_read"]
    # Each block of 32 columns wants the sums of all splits.
    assert read == {"scratch": splits * rows * (256 + 8 * 4) * 4}
    assert counters[COMBINE]["region_written"] == {"out": rows * 256 * 2, "lse": rows * 4}


def test_one_split_takes_one_launch(emulator):
    args = make(2, 4, 2, 1, 64, 128)
    with emulator.counting() as counters:
        attention(*args, **options(128))
    assert set(counters) == {SPLIT}
    assert counters[SPLIT]["blocks"] == 4
    assert counters[SPLIT]["region_written"] == {"out": bytes_of(args[0]), "lse": 2 * 4 * 4}


def test_a_row_without_keys_reads_none(emulator):
    args = make(1, 4, 2, 1, 3000, 128, lengths=[0])
    with emulator.counting() as counters:
        out, lse = attention(*args, **options(128))
    assert counters[SPLIT]["blocks"] > 8
    assert counters[SPLIT]["region_read"].keys() == {"q_start", "kv_len"}
    assert counters[SPLIT]["barriers"] == 0
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def eager(q, k, v, q_start, kv_len, kv_start=None, k_base=None, *, scale, softcap, window):
    seen = reference.visible(q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.softmax(scores.float().masked_fill(~seen[:, None], -math.inf), -1)
    return p.nan_to_num(0.0).to(q.dtype) @ v


@pytest.mark.parametrize(("dtype", "softcap"), [*FORMS, (BF16, 100.0), (F16, 0.0)])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(("group", "Sq"), [(2, 1), (3, 5), (1, 16), (16, 1), (7, 1)])
def test_many_tiles_in_a_block_match_float64_as_well_as_eager(
    multiprocessors, dtype, softcap, D, group, Sq
):
    """On a ring whose end lies within a tile, with a window that ends there, too."""
    multiprocessors(1)
    window = 300
    args = make(1, group, 1, Sq, 333, D, dtype, [600], seed=D + Sq)
    kw = options(D, softcap, window)
    exact, exact_lse = reference.attention(
        *(a.double() if a.is_floating_point() else a for a in args), **kw
    )
    out, lse = attention(*args, **kw)
    assert_close_to_float64(out, eager(*args, **kw), exact, "out", 1.6e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=6e-5)


@pytest.mark.parametrize("multiprocessor_count", [1, 132])
@pytest.mark.parametrize("softcap", [50.0, 0.0])
def test_the_order_of_threads_and_copies_shows_in_no_bit(
    emulator, multiprocessors, multiprocessor_count, softcap
):
    multiprocessors(multiprocessor_count)
    args = make(1, 4, 2, 2, 700, 128)
    results = []
    for order in Order:
        for landing in Landing:
            emulator.configure(seed=len(results), order=order, landing=landing)
            results.append(attention(*args, **options(128, softcap)))
    emulator.configure()
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
