"""How decode attention is cut into splits: csrc/common/attention_plan.h, compiled for the host."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MOST_SPLITS = 128
H100 = 3 * 132  # blocks at a time with head_dim 256

ENTRIES = """
#include "common/attention_plan.h"
using namespace gemma2;
extern "C" int64_t keys(int64_t capacity, int64_t window, int64_t q_length) {
  return most_visible_keys(capacity, window, q_length);
}
extern "C" int64_t splits(int64_t sequences, int64_t keys, int64_t tile, int64_t resident) {
  return decode_splits(sequences, keys, tile, resident);
}
extern "C" int begin(int keys, int splits, int split) { return split_begin(keys, splits, split); }
extern "C" int most() { return kMaxSplits; }
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(ENTRIES)
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"),
            *("-shared", "-fPIC", f"-I{CSRC}", "-o", folder / "plan.so", folder / "plan.cpp"),
        ],
        check=True,
    )
    library = ctypes.CDLL(str(folder / "plan.so"))
    for entry in (library.keys, library.splits):
        entry.argtypes = [ctypes.c_int64] * (3 if entry is library.keys else 4)
        entry.restype = ctypes.c_int64
    assert library.most() == MOST_SPLITS
    return library


def ceil_div(a, b):
    return -(-a // b)


def test_a_window_bounds_the_keys_that_are_seen(plan):
    assert plan.keys(8192, 0, 1) == 8192
    assert plan.keys(4224, 4096, 1) == 4096
    assert plan.keys(4224, 4096, 5) == 4100
    assert plan.keys(128, 4096, 1) == 128


# Splits may be empty, but never begin before the one before, nor end beyond the keys.
@given(keys=st.integers(0, 300000), splits=st.integers(1, MOST_SPLITS))
def test_splits_take_every_key_once_and_are_equal_but_for_8_keys(plan, keys, splits):
    begins = [plan.begin(keys, splits, split) for split in range(splits + 1)]
    assert begins[0] == 0
    assert begins[-1] == keys
    sizes = [end - begin for begin, end in itertools.pairwise(begins)]
    assert all(begin % 8 == 0 or begin == keys for begin in begins)
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 15 if keys % 8 else max(sizes) - min(sizes) <= 8


@given(
    sequences=st.integers(0, 5000),
    keys=st.integers(0, 1 << 20),
    tile=st.sampled_from([32, 64]),
    resident=st.integers(1, 1000),
)
def test_the_number_of_splits_is_bounded(plan, sequences, keys, tile, resident):
    """By the keys, by the second launch, and by four waves of blocks."""
    splits = plan.splits(sequences, keys, tile, resident)
    assert 1 <= splits <= MOST_SPLITS
    assert splits <= max(1, ceil_div(keys, tile))
    assert splits == 1 or splits * sequences <= 4 * resident


@pytest.mark.parametrize("keys", [2048, 4096, 8192, 32768])
@pytest.mark.parametrize("heads", [4, 8, 16])
def test_one_sequence_fills_most_of_the_device(plan, heads, keys):
    blocks = heads * plan.splits(heads, keys, 32, H100)
    tiles = heads * keys // 32
    assert min(tiles, H100) / 2 < blocks <= H100


def test_few_keys_are_not_cut(plan):
    for keys in (0, 1, 32, 64):
        assert plan.splits(4, keys, 32, H100) == 1


@pytest.mark.parametrize("sequences", [H100, 4 * H100, 4 * H100 + 1, 100000])
def test_many_sequences_fill_the_device_alone(plan, sequences):
    splits = plan.splits(sequences, 128, 32, H100)
    assert splits == 1


def test_a_bad_last_wave_is_cut(plan):
    """One block more than the device holds would run alone for as long as all the others."""
    keys, tile = 8192, 32
    splits = plan.splits(H100 + 1, keys, tile, H100)
    waves = ceil_div((H100 + 1) * splits, H100)
    assert splits > 1
    assert waves * ceil_div(keys // tile, splits) < 0.75 * 2 * keys // tile


@given(keys=st.integers(1, 1 << 18), sequences=st.integers(1, 64))
def test_more_multiprocessors_never_lengthen_the_longest_block_times_waves(plan, keys, sequences):
    def time(resident):
        splits = plan.splits(sequences, keys, 32, resident)
        tiles = ceil_div(ceil_div(keys, 32), splits)
        return ceil_div(sequences * splits, resident) * (tiles + 2) + (2 if splits > 1 else 0)

    assert time(4 * H100) <= time(H100)
