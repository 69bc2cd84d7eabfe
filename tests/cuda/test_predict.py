"""The model on paper counts what the emulator counts, and plans as the kernels do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.attention_model import (
    decode_splits,
    prefill_counts,
    sums_side_by_side,
    tile_of,
)
from benchmarks.gpus import A100, H100, RTX_4090
from gemma2 import _C, ops
from tests.cuda.occupancy import MULTIPROCESSORS, resident_blocks
from tests.cuda.plans import plan_of


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "window"),
    [
        ((4, 2, 64), 150, 150, 0),
        ((3, 1, 128), 90, 200, 70),
        ((2, 1, 256), 100, 100, 0),
        ((2, 1, 256), 90, 250, 100),
    ],
)
def test_prefill_has_as_many_instructions_as_predicted(emulated, heads, queries, keys, window):
    q_heads, kv_heads, dim = heads
    case = {"heads": heads, "batch": 2, "queries": queries, "keys": keys, "window": window}
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, q_heads, queries, dim, generator=g).to(torch.bfloat16)
    k, v = torch.randn(2, 2, kv_heads, keys, dim, generator=g).to(torch.bfloat16)
    start, end = torch.full((2,), keys - queries), torch.full((2,), keys)
    with emulated.counting() as counters:
        ops.attention(q, k, v, start, end, scale=dim**-0.5, softcap=50.0, window=window)
    kernel = counters["attention_prefill"]
    counted = kernel["instructions"]
    # ldmatrix is counted in each lane, a copy where it writes and, unless it fills with zeros, reads.
    counted["ldmatrix"] //= 32
    counted["copy_async"] -= sum(kernel["region_read"][name] for name in "qkv") // 16
    predicted = prefill_counts({**case, "dtype": "bfloat16"})
    assert {name: counted[name] for name in predicted} == predicted


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tiles_take_the_planned_shared_memory_and_as_many_blocks_are_resident(dim):
    planned = plan_of(f"attention_prefill<bf16, {dim}, false>")
    assert tile_of(dim).shared == planned.dynamic_shared
    # The RTX 4090 (sm_89) has the limits of sm_86.
    for device, arch in ((A100, 80), (RTX_4090, 86), (H100, 90)):
        sm = MULTIPROCESSORS[arch]
        blocks = resident_blocks(sm, planned.threads, planned.registers, planned.dynamic_shared)
        assert tile_of(dim).resident(device) == blocks


@given(
    sequences=st.integers(1, 600),
    keys=st.integers(1, 100000),
    tile=st.sampled_from([32, 64]),
    resident=st.integers(1, 600),
)
def test_decode_is_split_as_the_kernel_splits(sequences, keys, tile, resident):
    splits = _C.decode_splits(sequences, keys, tile, resident)
    assert decode_splits(sequences, keys, tile, resident) == splits


@given(
    blocks=st.integers(1, 600),
    rows=st.integers(1, 64),
    keys=st.integers(0, 100000),
    resident=st.integers(1, 600),
)
def test_deterministic_sums_are_made_as_the_kernel_makes_them(blocks, rows, keys, resident):
    parts = _C.sums_side_by_side(blocks, rows, keys, resident)
    assert sums_side_by_side(blocks, rows, keys, resident) == parts
