"""Attention at Gemma 2's shapes (2B: 8 query heads, 4 key/value heads, head_dim 256), against torch.

Peers: SDPA, which knows neither cap nor window (its floor for the same products); FlexAttention,
compiled, with both; transformers' eager attention, with both. FLOP: 4 D per visible pair and query
head, the causal half only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gemma2 import ops

CAP = 50.0
Q_HEADS, KV_HEADS = 8, 4
COLD_BYTES = (
    128 << 20
)  # of caches, taken in turns, so that a decode step finds none in the processor


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


def flex(queries: int, keys: int, window: int, scale: float) -> Callable[..., Any]:
    """FlexAttention with cap and window, compiled at its first call (half a minute)."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = i + (keys - queries)
        return (j <= p) & (j > p - window) if window else j <= p

    mask = create_block_mask(visible, None, None, queries, keys, device="cpu")
    torch.compiler.reset()  # each case compiles anew; many in one process reach dynamo's limit
    return functools.partial(
        torch.compile(flex_attention, dynamic=False),
        score_mod=cap,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
    )


def run(case: dict[str, Any]) -> dict[str, Any]:
    queries, keys, D, window = (case[n] for n in ("queries", "keys", "D", "window"))
    dtype, scale = getattr(torch, case["dtype"]), D**-0.5
    q = torch.randn(1, Q_HEADS, queries, D).to(dtype) * 4
    cache_bytes = 2 * KV_HEADS * keys * D * q.element_size()
    copies = 1 if queries > 8 else -(-COLD_BYTES // cache_bytes)
    caches = [torch.randn(2, 1, KV_HEADS, keys, D).to(dtype) for _ in range(copies)]
    turns = itertools.cycle(caches)

    start, length = torch.tensor([keys - queries]), torch.tensor([keys])
    p, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    seen = (j <= p) & ((j > p - window) if window else True)
    hidden = torch.zeros(queries, keys, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    def ours(deterministic: bool = False) -> object:
        k, v = next(turns)
        options = {"scale": scale, "softcap": CAP, "window": window}
        return ops.attention(q, k, v, start, length, **options, deterministic=deterministic)

    flexible = flex(queries, keys, window, scale)
    return {
        "ours": ours,
        "deterministic": lambda: ours(True),
        "sdpa, no cap": lambda: sdpa(q, *next(turns), scale, causal=queries == keys),
        "flex": lambda: flexible(q, *next(turns)),
        "eager": lambda: eager(q, *next(turns), scale, hidden),
        "flop": 4 * D * Q_HEADS * int(seen.sum()) if queries > 8 else None,
        "bytes": cache_bytes if queries <= 8 else None,
    }
