"""Attention at Gemma 2's shapes, against torch.

Heads are those of 2B (8 query heads, 4 key/value heads, head_dim 256), 9B (16, 8, 256) and 27B (32,
16, 128). Peers: SDPA, which knows neither cap nor window (a bound: the same products, without what
is Gemma 2's); FlexAttention, compiled, with both; transformers' eager attention, with both, where its
matrix of scores fits, and compiled (on the CPU). FLOP: 4 D per visible pair and query head. Scores
reach several times the cap, and results are compared with exact ones before they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.check import Check
from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops

CAP = 50.0
HEADS = {"2b": (8, 4, 256), "9b": (16, 8, 256), "27b": (32, 16, 128)}
WINDOW = 4096
# Of q and k standard normal, scores have a standard deviation of 1 after the scale.
HOT = CAP
# Of caches, taken in turns, so that a decode step finds none in the processor.
COLD_BYTES = 128 << 20
EAGER_BYTES = 20e9  # what the eager peer may need for its scores
_EXACT_SCORES = 1 << 28  # of the exact result, at a time


def _case(
    heads: tuple[int, int, int],
    queries: int,
    keys: int,
    window: int = 0,
    batch: int = 1,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    return {
        "kind": "prefill" if queries == keys else "decode",
        "heads": heads,
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "window": window,
        "dtype": dtype,
    }


def cases() -> list[dict[str, Any]]:
    dtypes, heads = ("float32", "bfloat16"), HEADS["2b"]
    return [
        *(_case(heads, S, S, dtype=dtype) for S in (128, 512, 2048, 4096) for dtype in dtypes),
        *(_case(heads, 4096, 4096, 1024, dtype=dtype) for dtype in dtypes),
        *(_case((8, 4, D), 2048, 2048) for D in (64, 128)),
        *(_case(heads, n, 4096, dtype=dtype) for n in (1, 4) for dtype in dtypes),
    ]


def cuda_cases() -> list[dict[str, Any]]:
    """What counts most comes first, for a run that may be cut off. A window needs more keys than it."""
    lengths = ((2048, 0), (8192, 0), (8192, WINDOW), (32768, 0), (32768, WINDOW), (512, 0))
    prefill = [
        _case(HEADS[size], S, S, window) for size in ("2b", "27b", "9b") for S, window in lengths
    ]
    contexts = [(batch, keys) for keys in (8192, 32768, 1024) for batch in (1, 8, 64)]
    decode = [_case(HEADS["2b"], 1, keys, batch=batch) for batch, keys in contexts]
    # Five tokens at once: verification of four that were guessed.
    decode.insert(3, _case(HEADS["2b"], 5, 8192))
    decode.insert(4, _case(HEADS["2b"], 1, 32768, WINDOW, batch=8))
    decode += [_case(HEADS["27b"], 1, keys, batch=batch) for batch, keys in contexts]
    return prefill + decode


def tiny(case: dict[str, Any]) -> dict[str, Any]:
    """Give a GPU's case at a size for any CPU; the window still hides something."""
    keys = max(64, case["keys"] // 128)
    return {
        **case,
        "batch": min(case["batch"], 3),
        "queries": keys if case["kind"] == "prefill" else case["queries"],
        "keys": keys,
        "window": case["window"] // 128,
    }


# ---- sizes --------------------------------------------------------------------------------------


def pairs(queries: int, keys: int, window: int) -> int:
    """Give how many pairs of a query and a key are visible; the queries are the last positions."""
    return sum(min(p + 1, window or p + 1) for p in range(keys - queries, keys))


def cache_bytes(case: dict[str, Any]) -> int:
    """Give the bytes of all keys and values."""
    _, kv_heads, D = case["heads"]
    size = getattr(torch, case["dtype"]).itemsize
    return 2 * case["batch"] * kv_heads * case["keys"] * D * size


def eager_bytes(case: dict[str, Any]) -> int:
    """Give what the eager peer needs at once: scores in three forms, keys and values repeated."""
    q_heads, kv_heads, _ = case["heads"]
    scores = case["batch"] * q_heads * case["queries"] * case["keys"]
    return 8 * scores + q_heads // kv_heads * cache_bytes(case)


def peak_bytes(case: dict[str, Any]) -> int:
    """Give an upper bound of what a GPU must hold at once for the case."""
    q_heads, _, D = case["heads"]
    rows = case["batch"] * q_heads * case["queries"] * D
    # The mask of FlexAttention is made of whole matrices, and so is the eager peer's.
    masks = 8 * case["queries"] * case["keys"]
    # Repeated by torch's SDPA, too, if it takes no fused kernel for it.
    peer = q_heads * cache_bytes(case) // case["heads"][1]
    if eager_bytes(case) <= EAGER_BYTES:
        peer = max(peer, eager_bytes(case))
    exact = 5 * 4 * _EXACT_SCORES + 3 * 4 * rows
    inputs = max(cache_bytes(case), 256 << 20)  # a set, or several small ones
    return inputs + masks + 8 * rows + max(peer, exact)


def worth_compiling(case: dict[str, Any]) -> bool:
    """Whether FlexAttention, which compiles for seconds at each shape, is worth it on a GPU."""
    if case["kind"] == "decode":
        return case["keys"] == 8192 and case["batch"] != 8
    if case["heads"] == HEADS["2b"]:
        return case["keys"] >= 2048
    return case["heads"] == HEADS["27b"] and case["keys"] == 8192


# ---- what is compared ---------------------------------------------------------------------------


def exact(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, cap: float = CAP
) -> Tensor:
    """Attention in float32 (float64 of float32), in pieces of bounded memory; cap 0: without."""
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    batch, q_heads, queries, D = q.shape
    kv_heads, keys = k.shape[1:3]
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    step = max(1, _EXACT_SCORES // (q_heads * keys))
    for b in range(batch):
        grouped = q[b].view(kv_heads, q_heads // kv_heads, queries, D)
        for i in range(0, queries, step):
            rows = grouped[:, :, i : i + step].to(wide)
            p = torch.arange(keys - queries + i, keys - queries + i + rows.shape[2])
            first = max(0, int(p[0]) - window + 1) if window else 0
            last = int(p[-1]) + 1
            seen = (slice(None), slice(first, last))
            scores = rows.flatten(1, 2) @ k[b][seen].to(wide).mT * scale
            if cap:
                scores = scores.div_(cap).tanh_().mul_(cap)
            j, p = torch.arange(first, last, device=q.device), p.to(q.device)[:, None]
            hidden = (j > p) | ((j <= p - window) if window else False)
            scores.view(*rows.shape[:3], -1).masked_fill_(hidden, -torch.inf)
            found = scores.softmax(-1) @ v[b][seen].to(wide)
            out[b, :, i : i + step] = found.view(q_heads, -1, D)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """No cap, no window: torch's fused kernel has neither."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=True)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """As transformers' eager_attention_forward of Gemma 2."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = torch.tanh(scores / CAP) * CAP + hidden
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


def hidden_of(queries: int, keys: int, window: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Give what the eager peer adds to its scores."""
    j = torch.arange(keys, device=device)
    p = j[keys - queries :, None]
    seen = (j <= p) & ((j > p - window) if window else True)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def flex(
    queries: int, keys: int, window: int, scale: float, device: torch.device
) -> Callable[..., Any]:
    """FlexAttention with cap and window; the mask is made and compiled at the first call."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = i + (keys - queries)
        return (j <= p) & (j > p - window) if window else j <= p

    @functools.cache
    def mask() -> Any:
        return create_block_mask(visible, None, None, queries, keys, device=str(device))

    attend = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q, k, v, score_mod=cap, block_mask=mask(), scale=scale, enable_gqa=True)

    return call


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    batch, queries, keys, window = (case[n] for n in ("batch", "queries", "keys", "window"))
    (q_heads, kv_heads, D), dtype = case["heads"], getattr(torch, case["dtype"])
    decode, cuda = case["kind"] == "decode", device.type == "cuda"
    scale = D**-0.5
    draw = Draw(device)
    q = draw.normal(batch, q_heads, queries, D, dtype=dtype) * HOT

    def caches() -> tuple[Tensor, ...]:
        return tuple(draw.normal(batch, kv_heads, keys, D, dtype=dtype) for _ in range(2))

    seen_keys = min(keys, window + queries - 1) if window else keys
    moved = cache_bytes(case) // keys * seen_keys
    inputs = Inputs(caches, moved, device, COLD_BYTES if decode else 0)
    start, length = (torch.full((batch,), n, device=device) for n in (keys - queries, keys))
    options = {"scale": scale, "softcap": CAP, "window": window}

    def ours(k: Tensor, v: Tensor) -> object:
        return ops.attention(q, k, v, start, length, **options)

    def deterministic(k: Tensor, v: Tensor) -> object:
        return ops.attention(q, k, v, start, length, **options, deterministic=True)

    calls: dict[str, Callable[..., object]] = {
        "ours": ours,
        "deterministic": deterministic,
        "sdpa, no cap": lambda k, v: sdpa(q, k, v, scale, causal=queries == keys),
    }
    notes = dict(inputs.note)
    if eager_bytes(case) <= EAGER_BYTES:
        hidden = hidden_of(queries, keys, window, dtype, device)

        def by_torch(k: Tensor, v: Tensor) -> Tensor:
            return eager(q, k, v, scale, hidden)

        calls["eager"] = by_torch
        if not cuda:
            calls["compile"] = compiled(by_torch)
    else:
        notes["eager"] = f"its scores would need {eager_bytes(case) / 1e9:.0f} GB"
    if not cuda or worth_compiling(case):
        flexible = flex(queries, keys, window, scale, device)
        calls["flex"] = lambda k, v: flexible(q, k, v)
    expected = functools.partial(exact, q, *inputs.sets[0], scale=scale, window=window)
    return {
        **{name: inputs.call(call) for name, call in calls.items()},
        "check": Check(expected, dtype, mistake=functools.partial(expected, cap=0.0)),
        "checked": ("ours", "deterministic", "flex"),
        "flop": None if decode else 4 * D * q_heads * batch * pairs(queries, keys, window),
        "bytes": moved if decode else None,
        **notes,
    }
