"""cache_write: keys and values into ring slots, against torch's index_copy_."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops

CAPACITY = 4224  # of a sliding layer: window 4096, margin 64, rounded up to 128
FIRST = 3000  # position of the first new token


def cases() -> list[dict[str, Any]]:
    return [
        {"heads": heads, "dim": dim, "tokens": tokens, "dtype": dtype, "cache": cache}
        for heads, dim in ((4, 256), (16, 128))
        for dtype, cache in (("bfloat16", "bfloat16"), ("float32", "bfloat16"))
        for tokens in (1, 512, 4096)
    ]


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    dtype, cache_dtype = getattr(torch, case["dtype"]), getattr(torch, case["cache"])
    heads, dim, tokens = case["heads"], case["dim"], case["tokens"]
    draw = Draw(device)
    start, end = (torch.tensor([n], device=device) for n in (FIRST, FIRST + tokens))
    slots = torch.arange(FIRST, FIRST + tokens, device=device) % CAPACITY

    def draw_set() -> tuple[Tensor, ...]:
        new = draw.normal(2, 1, tokens, heads, dim).to(dtype).transpose(2, 3)
        caches = torch.zeros(2, 1, heads, CAPACITY, dim, dtype=cache_dtype, device=device)
        return *new, *caches

    def ours(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        ops.cache_write(k_cache, v_cache, k, v, start, end)

    def index_copy(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        k_cache.index_copy_(2, slots, k.to(cache_dtype))
        v_cache.index_copy_(2, slots, v.to(cache_dtype))

    moved = 2 * heads * tokens * dim * (dtype.itemsize + cache_dtype.itemsize)
    inputs = Inputs(draw_set, moved, device)
    return {
        "ours": inputs.call(ours),
        "index_copy": inputs.call(index_copy),
        "compile": inputs.call(compiled(index_copy)),
        "bytes": moved,
        **inputs.note,
    }
