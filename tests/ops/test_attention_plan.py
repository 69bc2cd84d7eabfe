"""How attention on CUDA is cut: decode into splits of keys, the deterministic one into sums of 512
(csrc/common/attention_plan.h)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2 import _C

H100 = 3 * 132  # blocks at a time with head_dim 256


def ceil_div(a, b):
    return -(-a // b)


def test_a_window_bounds_the_keys_that_are_seen():
    assert _C.most_visible_keys(8192, 0, 1) == 8192
    assert _C.most_visible_keys(4224, 4096, 1) == 4096
    assert _C.most_visible_keys(4224, 4096, 5) == 4100
    assert _C.most_visible_keys(128, 4096, 1) == 128


def begins_of(keys, splits):
    return [_C.split_begin(keys, splits, split) for split in range(splits + 1)]


@given(keys=st.integers(0, 300000), splits=st.integers(1, _C.max_splits))
def test_splits_take_every_key_once_in_order_and_are_equal_but_for_8_keys(keys, splits):
    begins = begins_of(keys, splits)
    assert begins[0] == 0
    assert begins[-1] == keys
    sizes = [end - begin for begin, end in itertools.pairwise(begins)]
    assert all(begin % 8 == 0 or begin == keys for begin in begins)
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 15 if keys % 8 else max(sizes) - min(sizes) <= 8
    # Only where there are not 8 keys for each.
    assert min(sizes) > 0 or keys <= 8 * (splits - 1)


def any_launch(least):
    return given(
        sequences=st.integers(least, 5000),
        keys=st.integers(least, 1 << 20),
        tile=st.sampled_from([32, 64]),
        resident=st.integers(1, 1000),
    )


@any_launch(least=1)
def test_no_split_of_a_full_cache_is_empty(sequences, keys, tile, resident):
    """Of a shorter one some are, since a captured launch knows the capacity only."""
    begins = begins_of(keys, _C.decode_splits(sequences, keys, tile, resident))
    assert all(begin < end for begin, end in itertools.pairwise(begins))


@any_launch(least=0)
def test_the_number_of_splits_is_bounded(sequences, keys, tile, resident):
    """By the keys, by the second launch, and by four waves of blocks."""
    splits = _C.decode_splits(sequences, keys, tile, resident)
    assert 1 <= splits <= _C.max_splits
    assert splits <= max(1, ceil_div(keys, tile))
    assert splits == 1 or splits * sequences <= 4 * resident


@pytest.mark.parametrize("keys", [2048, 4096, 8192, 32768])
@pytest.mark.parametrize("heads", [4, 8, 16])
def test_one_sequence_fills_most_of_the_device(heads, keys):
    blocks = heads * _C.decode_splits(heads, keys, 32, H100)
    tiles = heads * keys // 32
    assert min(tiles, H100) / 2 < blocks <= H100


def test_few_keys_are_not_cut():
    for keys in (0, 1, 32, 64):
        assert _C.decode_splits(4, keys, 32, H100) == 1


@pytest.mark.parametrize("sequences", [H100, 4 * H100, 4 * H100 + 1, 100000])
def test_many_sequences_fill_the_device_alone(sequences):
    splits = _C.decode_splits(sequences, 128, 32, H100)
    assert splits == 1


def test_a_bad_last_wave_is_cut():
    """One block more than the device holds would run alone for as long as all the others."""
    keys, tile = 8192, 32
    splits = _C.decode_splits(H100 + 1, keys, tile, H100)
    waves = ceil_div((H100 + 1) * splits, H100)
    assert splits > 1
    assert waves * ceil_div(keys // tile, splits) < 0.75 * 2 * keys // tile


@given(keys=st.integers(1, 1 << 18), sequences=st.integers(1, 64))
def test_more_multiprocessors_never_lengthen_the_longest_block_times_waves(keys, sequences):
    def time(resident):
        splits = _C.decode_splits(sequences, keys, 32, resident)
        tiles = ceil_div(ceil_div(keys, 32), splits)
        return ceil_div(sequences * splits, resident) * (tiles + 2) + (2 if splits > 1 else 0)

    assert time(4 * H100) <= time(H100)


@given(first=st.integers(0, 1 << 20), keys=st.integers(1, 10000))
def test_keys_never_take_part_in_more_sums_than_the_most(first, keys):
    assert (first + keys - 1) // 512 - first // 512 + 1 <= _C.most_sums(keys)


@given(keys=st.integers(1, 10000))
def test_some_keys_take_part_in_the_most_sums(keys):
    first = 511  # the last key of a sum
    assert (first + keys - 1) // 512 - first // 512 + 1 == _C.most_sums(keys)


@given(
    blocks=st.integers(1, 5000),
    rows=st.integers(1, 64),
    keys=st.integers(0, 1 << 20),
    resident=st.integers(1, 1000),
)
def test_sums_are_made_all_side_by_side_or_in_turn(blocks, rows, keys, resident):
    assert _C.sums_side_by_side(blocks, rows, keys, resident) in (1, _C.most_sums(keys))


def test_a_token_at_a_long_context_makes_its_sums_side_by_side():
    assert _C.sums_side_by_side(4, 2, 8192, 2 * 132) == _C.most_sums(8192) == 17
    assert _C.sums_side_by_side(4, 2, 4096, 2 * 132) == 9


def test_blocks_that_fill_the_device_make_their_sums_in_turn():
    for rows in (16, 64):
        assert _C.sums_side_by_side(2 * 132, rows, 8192, 2 * 132) == 1


@pytest.mark.parametrize("keys", [1, 64, 512])
def test_few_keys_are_summed_in_turn(keys):
    assert _C.sums_side_by_side(4, 2, keys, 2 * 132) == 1
