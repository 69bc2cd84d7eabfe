"""cache_write: keys and values into ring slots, against torch's index_copy_."""

from __future__ import annotations

from typing import Any

import torch

from gemma2 import ops

CAPACITY = 4224  # of a sliding layer: window 4096, margin 64, rounded up to 128


def cases() -> list[dict[str, Any]]:
    return [
        {"heads": heads, "dim": dim, "tokens": tokens, "dtype": dtype, "cache": cache}
        for heads, dim in ((4, 256), (16, 128))
        for dtype, cache in (("bfloat16", "bfloat16"), ("float32", "bfloat16"))
        for tokens in (1, 512, 4096)
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype, cache_dtype = getattr(torch, case["dtype"]), getattr(torch, case["cache"])
    heads, dim, tokens = case["heads"], case["dim"], case["tokens"]
    k, v = torch.randn(2, 1, tokens, heads, dim).to(dtype).transpose(2, 3)
    k_cache, v_cache = torch.zeros(2, 1, heads, CAPACITY, dim, dtype=cache_dtype)
    start, end = torch.tensor([3000]), torch.tensor([3000 + tokens])
    slots = torch.arange(3000, 3000 + tokens) % CAPACITY

    def index_copy() -> None:
        k_cache.index_copy_(2, slots, k.to(cache_dtype))
        v_cache.index_copy_(2, slots, v.to(cache_dtype))

    return {
        "ours": lambda: ops.cache_write(k_cache, v_cache, k, v, start, end),
        "index_copy": index_copy,
        "bytes": 2 * k.numel() * (k.element_size() + k_cache.element_size()),
    }
