"""Attention at Gemma 2's shapes (2B: 8 query heads, 4 key/value heads, head_dim 256), against torch.

Peers: SDPA, which knows neither cap nor window (its floor for the same products); FlexAttention,
compiled, with both; transformers' eager attention, with both, and compiled. FLOP: 4 D per visible
pair and query head, the causal half only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops

CAP = 50.0
Q_HEADS, KV_HEADS = 8, 4
# Of caches, taken in turns, so that a decode step finds none in the processor.
COLD_BYTES = 128 << 20


def cases() -> list[dict[str, Any]]:
    def case(queries: int, keys: int, dtype: str, window: int = 0, D: int = 256) -> dict[str, Any]:
        return {"queries": queries, "keys": keys, "D": D, "window": window, "dtype": dtype}

    dtypes = ("float32", "bfloat16")
    prefill = [case(S, S, dtype) for S in (128, 512, 2048, 4096) for dtype in dtypes]
    window = [case(4096, 4096, dtype, 1024) for dtype in dtypes]
    small_heads = [case(2048, 2048, "bfloat16", D=D) for D in (64, 128)]
    decode = [case(n, 4096, dtype) for n in (1, 4) for dtype in dtypes]
    return prefill + window + small_heads + decode


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """No cap, no window: torch's fused kernel has neither."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=True)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """As transformers' eager_attention_forward of Gemma 2."""
    k, v = (x.repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = torch.tanh(scores / CAP) * CAP + hidden
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


def flex(
    queries: int, keys: int, window: int, scale: float, device: torch.device
) -> Callable[..., Any]:
    """FlexAttention with cap and window, compiled at its first call (half a minute)."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = i + (keys - queries)
        return (j <= p) & (j > p - window) if window else j <= p

    mask = create_block_mask(visible, None, None, queries, keys, device=str(device))
    return functools.partial(
        torch.compile(flex_attention, dynamic=False),
        score_mod=cap,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
    )


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    queries, keys, D, window = (case[n] for n in ("queries", "keys", "D", "window"))
    dtype, scale = getattr(torch, case["dtype"]), D**-0.5
    draw = Draw(device)
    q = draw.normal(1, Q_HEADS, queries, D).to(dtype) * 4
    cache_bytes = 2 * KV_HEADS * keys * D * q.element_size()
    decode = queries <= 8
    inputs = Inputs(
        lambda: draw.normal(2, 1, KV_HEADS, keys, D).to(dtype).unbind(),
        cache_bytes,
        device,
        COLD_BYTES if decode else 0,
    )
    start, length = (torch.tensor([n], device=device) for n in (keys - queries, keys))
    j = torch.arange(keys, device=device)
    p = j[keys - queries :, None]
    seen = (j <= p) & ((j > p - window) if window else True)
    hidden = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    options = {"scale": scale, "softcap": CAP, "window": window}

    def ours(k: Tensor, v: Tensor) -> object:
        return ops.attention(q, k, v, start, length, **options)

    def deterministic(k: Tensor, v: Tensor) -> object:
        return ops.attention(q, k, v, start, length, **options, deterministic=True)

    def by_torch(k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v, scale, hidden)

    flexible = flex(queries, keys, window, scale, device)
    return {
        "ours": inputs.call(ours),
        "deterministic": inputs.call(deterministic),
        "sdpa, no cap": inputs.call(lambda k, v: sdpa(q, k, v, scale, causal=queries == keys)),
        "flex": inputs.call(lambda k, v: flexible(q, k, v)),
        "eager": inputs.call(by_torch),
        "compile": inputs.call(compiled(by_torch)),
        "flop": None if decode else 4 * D * Q_HEADS * int(seen.sum()),
        "bytes": cache_bytes if decode else None,
        **inputs.note,
    }
