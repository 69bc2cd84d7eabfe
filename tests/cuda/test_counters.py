"""What the memory-bound CUDA kernels move, counted by the emulator: each byte as often as planned.

Shapes are those of Gemma 2, with few rows. A request is one load or store of a warp; 32 lanes with 16
bytes each are 512 bytes in 16 sectors of 32 bytes, which is what all of these kernels plan for.
"""

from __future__ import annotations

import pytest
import torch

from gemma2 import ops

pytestmark = pytest.mark.usefixtures("emulated")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def count(emulator):
    """`count("geglu", call)`: the counters of the only kernel that the call launches."""

    def count(kernel, call):
        with emulator.counting() as counters:
            call()
        assert set(counters) == {kernel}
        assert counters[kernel]["launches"] == 1
        return counters[kernel]

    return count


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def assert_full_requests(counters, narrower=0):
    """Every sector of every request is used, and every request has 16, but for `narrower` ones."""
    for traffic in (counters["global_read"], counters["global_write"]):
        assert traffic["bytes"] == 32 * traffic["sectors"]
    requests = counters["global_read"]["requests"] + counters["global_write"]["requests"]
    sectors = counters["global_read"]["sectors"] + counters["global_write"]["sectors"]
    assert sectors == 16 * requests - 8 * narrower


def conflicts(counters):
    return sum(bank["conflicts"] for bank in counters["shared"].values())


@pytest.mark.parametrize("hidden", [2304, 3584, 4608])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(BF16, BF16), (F16, F16), (F32, F32), (F32, F16)]
)
def test_rms_norm_moves_rows_once_and_the_weights_once_a_row(count, hidden, dtype, weight_dtype):
    x, w = torch.randn(3, hidden).to(dtype), torch.randn(hidden).to(weight_dtype)
    counters = count("rms_norm", lambda: ops.rms_norm(x, w))
    assert counters["region_read"] == {"x": bytes_of(x), "weight": 3 * bytes_of(w)}
    assert counters["region_written"] == {"out": 3 * bytes_of(w)}
    # Beside float32, float16 moves in accesses of 8 bytes.
    wide = hidden // 4 // 32
    assert_full_requests(counters, narrower=3 * 2 * wide if dtype != weight_dtype else 0)
    assert counters["barriers"] == counters["blocks"] == 3
    assert conflicts(counters) == 0


@pytest.mark.parametrize("hidden", [2304, 3584, 4608])
@pytest.mark.parametrize(("residual_dtype", "dtype"), [(BF16, BF16), (F32, F32), (F32, F16)])
@pytest.mark.parametrize("in_place", [False, True])
def test_add_rms_norm_moves_the_stream_once_in_and_once_out(
    count, hidden, residual_dtype, dtype, in_place
):
    residual, x = torch.randn(2, hidden).to(residual_dtype), torch.randn(2, hidden).to(dtype)
    post, pre = torch.randn(2, hidden).to(dtype)
    call = ops.add_rms_norm_ if in_place else ops.add_rms_norm
    counters = count("add_rms_norm", lambda: call(residual, x, post, pre))
    assert counters["region_read"] == {
        "residual_out" if in_place else "residual": bytes_of(residual),
        "x": bytes_of(x),
        "post_weight": 2 * bytes_of(post),
        "pre_weight": 2 * bytes_of(pre),
    }
    assert counters["region_written"] == {"residual_out": bytes_of(residual), "y": bytes_of(x)}
    wide = hidden // 4 // 32
    assert_full_requests(counters, narrower=2 * 4 * wide if dtype != residual_dtype else 0)
    assert counters["barriers"] == 2 * counters["blocks"] == 4
    assert conflicts(counters) == 0


@pytest.mark.parametrize("hidden", [2304, 3584, 4608])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_embed_moves_the_rows_of_its_tokens_once(count, hidden, dtype):
    weight = torch.randn(9, hidden).to(dtype)
    ids = torch.tensor([[8, 0, 8]])
    counters = count("embed", lambda: ops.embed(ids, weight, 48.0))
    row = bytes_of(weight[0])
    assert counters["region_read"]["weight"] == counters["region_written"]["out"] == 3 * row
    written = counters["global_write"]
    assert written["bytes"] == 32 * written["sectors"] == 512 * written["requests"]
    # Each warp reads its token's id, too: one sector.
    warps = counters["threads"] // 32
    assert counters["global_read"]["sectors"] == 3 * row // 32 + warps
    assert counters["global_read"]["requests"] == 3 * row // 512 + warps


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("width", [9216, 14336])
def test_geglu_moves_gate_up_and_out_once(count, width, dtype):
    gate, up = torch.randn(2, width).to(dtype), torch.randn(2, width).to(dtype)
    counters = count("geglu", lambda: ops.geglu(gate, up))
    assert counters["region_read"] == {"gate": bytes_of(gate), "up": bytes_of(up)}
    assert counters["region_written"] == {"out": bytes_of(gate)}
    assert_full_requests(counters)


def test_geglu_reads_the_halves_of_one_projection_as_they_lie(count):
    both = torch.randn(2, 2 * 9216).to(BF16)
    gate, up = both.chunk(2, dim=-1)
    counters = count("geglu", lambda: ops.geglu(gate, up))
    assert counters["region_read"] == {"gate": bytes_of(gate), "up": bytes_of(up)}
    assert_full_requests(counters)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_softcap_moves_logits_once(count, dtype):
    x = torch.randn(2, 8192).to(dtype)
    counters = count("softcap", lambda: ops.softcap(x, 30.0))
    assert counters["region_read"] == {"x": bytes_of(x)}
    assert counters["region_written"] == {"out": bytes_of(x)}
    assert_full_requests(counters)


def heads(length, count, dim=256, dtype=BF16):
    """[1, H, S, D] as a projection leaves it: [1, S, H, D] in memory."""
    return torch.randn(1, length, count, dim).to(dtype).transpose(1, 2)


def table(length, dim=256):
    return ops.rope_table(torch.arange(length)[None], dim)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim"),
    [(8, 4, 256), (16, 8, 256), (32, 16, 128)],
    ids=["2b", "9b", "27b"],
)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rope_moves_q_and_k_once(count, q_heads, kv_heads, dim, dtype):
    q, k = heads(1, q_heads, dim, dtype), heads(1, kv_heads, dim, dtype)
    cos, sin = table(1, dim)
    counters = count("rope", lambda: ops.rope(q, k, cos, sin))
    read = counters["region_read"]
    assert {"q": read["q"], "k": read["k"]} == {"q": bytes_of(q), "k": bytes_of(k)}
    assert counters["region_written"] == {"q_out": bytes_of(q), "k_out": bytes_of(k)}
    assert counters["global_write"]["sectors"] * 32 == bytes_of(q, k)
    # In decode a thread has at most two heads, and each fetches the angles from the cache.
    assert read["cos"] == read["sin"] <= (q_heads + kv_heads) * bytes_of(cos)


def test_rope_fetches_angles_once_for_four_heads_in_prefill(count):
    length = 700
    q, k = heads(length, 8), heads(length, 4)
    cos, sin = table(length)
    counters = count("rope", lambda: ops.rope(q, k, cos, sin))
    assert counters["region_read"] == {
        "q": bytes_of(q),
        "k": bytes_of(k),
        "cos": 12 // 4 * bytes_of(cos),
        "sin": 12 // 4 * bytes_of(sin),
    }
    assert counters["global_write"]["sectors"] * 32 == bytes_of(q, k)


def test_rope_cache_moves_q_k_and_v_once_and_writes_one_slot(count):
    q, k, v = heads(1, 8), heads(1, 4), heads(1, 4)
    k_cache, v_cache = torch.zeros(2, 1, 4, 128, 256, dtype=BF16)
    where = torch.tensor([130]), torch.tensor([131])
    counters = count(
        "rope_cache", lambda: ops.rope_cache(q, k, v, *table(1), k_cache, v_cache, *where)
    )
    read = counters["region_read"]
    assert {name: read[name] for name in "qkv"} == {
        "q": bytes_of(q), "k": bytes_of(k), "v": bytes_of(v)
    }  # fmt: skip
    assert counters["region_written"] == {
        "q_out": bytes_of(q), "k_cache": bytes_of(k), "v_cache": bytes_of(v)
    }  # fmt: skip
    assert counters["global_write"]["bytes"] == 512 * counters["global_write"]["requests"]


def test_cache_write_reads_only_what_it_writes(count):
    """Of 150 columns a ring of 128 keeps the last ones, and 10 of those are pads."""
    k, v = heads(150, 4), heads(150, 4)
    k_cache, v_cache = torch.zeros(2, 1, 4, 128, 256, dtype=BF16)
    where = torch.tensor([0]), torch.tensor([140])
    counters = count("cache_write", lambda: ops.cache_write(k_cache, v_cache, k, v, *where))
    moved = 128 * 4 * 256 * 2
    read, written = counters["region_read"], counters["region_written"]
    assert read["k"] == read["v"] == moved
    assert written == {"k_cache": moved, "v_cache": moved}
    assert counters["global_write"]["bytes"] == 512 * counters["global_write"]["requests"]
