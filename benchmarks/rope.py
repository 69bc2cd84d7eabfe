"""rope, and rope_cache that rotates into the cache, against transformers' eager formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops

CAPACITY = 4224  # of a sliding layer: window 4096, margin 64, rounded up to 128
FIRST = 1000  # position of the first new token


def cases() -> list[dict[str, Any]]:
    shapes = {"2b": (8, 4, 256), "9b": (16, 8, 256), "27b": (32, 16, 128)}
    return [
        {"op": op, "model": model, "heads": heads, "tokens": tokens, "dtype": dtype}
        for op in ("rope", "rope_cache")
        for model, heads in shapes.items()
        for dtype in ("float32", "bfloat16")
        for tokens in (1, 512)
    ]


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' apply_rotary_pos_emb does it; cos and sin in x's dtype, full width."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    dtype, tokens = getattr(torch, case["dtype"]), case["tokens"]
    q_heads, kv_heads, dim = case["heads"]
    draw = Draw(device)

    def projected(heads: int) -> Tensor:
        return draw.normal(1, tokens, heads, dim).to(dtype).transpose(1, 2)

    cos, sin = ops.rope_table(torch.arange(FIRST, FIRST + tokens, device=device)[None], dim)
    wide = [torch.cat([t, t], dim=-1)[:, None].to(dtype) for t in (cos, sin)]
    head_bytes = tokens * dim * dtype.itemsize
    if case["op"] == "rope":

        def eager_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return eager(q, *wide), eager(k, *wide)

        moved = 2 * (q_heads + kv_heads) * head_bytes
        inputs = Inputs(lambda: (projected(q_heads), projected(kv_heads)), moved, device)
        return {
            "ours": inputs.call(lambda q, k: ops.rope(q, k, cos, sin)),
            "eager": inputs.call(eager_rope),
            "compile": inputs.call(compiled(eager_rope)),
            "bytes": moved,
            **inputs.note,
        }

    start, end = (torch.tensor([n], device=device) for n in (FIRST, FIRST + tokens))
    slots = torch.arange(FIRST, FIRST + tokens, device=device)

    def draw_set() -> tuple[Tensor, ...]:
        caches = torch.zeros(2, 1, kv_heads, CAPACITY, dim, dtype=dtype, device=device)
        return projected(q_heads), projected(kv_heads), projected(kv_heads), *caches

    def ours(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return ops.rope_cache(q, k, v, cos, sin, k_cache, v_cache, start, end)

    def eager_cache(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        k_cache.index_copy_(2, slots, eager(k, *wide))
        v_cache.index_copy_(2, slots, v)
        return eager(q, *wide)

    moved = 2 * (q_heads + 2 * kv_heads) * head_bytes
    inputs = Inputs(draw_set, moved, device)
    return {
        "ours": inputs.call(ours),
        "eager": inputs.call(eager_cache),
        "compile": inputs.call(compiled(eager_cache)),
        "bytes": moved,
        **inputs.note,
    }
