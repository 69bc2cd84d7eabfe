"""rope, and rope_cache that rotates into the cache, against transformers' eager formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2 import ops

CAPACITY = 4224  # of a sliding layer: window 4096, margin 64, rounded up to 128


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


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype, tokens = getattr(torch, case["dtype"]), case["tokens"]
    q_heads, kv_heads, dim = case["heads"]

    def projected(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, dim).to(dtype).transpose(1, 2)

    q, k, v = projected(q_heads), projected(kv_heads), projected(kv_heads)
    cos, sin = ops.rope_table(torch.arange(tokens)[None], dim)
    wide = [torch.cat([t, t], dim=-1)[:, None].to(dtype) for t in (cos, sin)]
    moved = q.numel() + k.numel()
    if case["op"] == "rope":
        return {
            "ours": lambda: ops.rope(q, k, cos, sin),
            "eager": lambda: (eager(q, *wide), eager(k, *wide)),
            "bytes": 2 * moved * q.element_size(),
        }
    k_cache, v_cache = torch.zeros(2, 1, kv_heads, CAPACITY, dim, dtype=dtype)
    start, end = torch.tensor([1000]), torch.tensor([1000 + tokens])
    slots = torch.arange(1000, 1000 + tokens)

    def eager_cache() -> Tensor:
        k_cache.index_copy_(2, slots, eager(k, *wide))
        v_cache.index_copy_(2, slots, v)
        return eager(q, *wide)

    return {
        "ours": lambda: ops.rope_cache(q, k, v, cos, sin, k_cache, v_cache, start, end),
        "eager": eager_cache,
        "bytes": 2 * (moved + v.numel()) * q.element_size(),
    }
