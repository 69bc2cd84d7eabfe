"""Every operator again, in plain torch: the tests' oracle, and the path for what has no kernel.

The functions take the arguments of their namesakes in :mod:`gemma2.ops`, run on any device, in any
float dtype (float64 included, where nothing is rounded to float32), and are differentiable. They
are written to be read, not to be fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for the narrow dtypes, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def embed(ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Rows of the table times ``scale`` rounded to the weight's dtype; the residual stream."""
    rows = torch.nn.functional.embedding(ids, weight)
    rounded = torch.tensor(scale, dtype=weight.dtype).to(_compute_dtype(weight)).item()
    out = rows.to(_compute_dtype(weight)) * rounded
    return out.to(weight.dtype) if weight.dtype == torch.bfloat16 else out


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * (1 + weight)``."""
    wide = x.to(_compute_dtype(x))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.to(wide.dtype))).to(weight.dtype)


def add_rms_norm(
    residual: Tensor, x: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``h = residual + rms_norm(x, post)``, rounded once; ``y = rms_norm(h, pre)``."""
    wide = _compute_dtype(x)
    update = rms_norm(x.to(wide), post_weight.to(wide), eps)
    h = (residual.to(wide) + update).to(residual.dtype)
    return h, rms_norm(h, pre_weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the two halves of each head: ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)``."""

    def rotate(x: Tensor) -> Tensor:
        wide = _compute_dtype(x)
        c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
        x1, x2 = x.to(wide).chunk(2, dim=-1)
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def cache_write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    k_base: Tensor | None = None,
) -> None:
    """Writes each row's real tokens into slot ``(position - k_base) mod C``, the last C at most."""
    capacity = k_cache.shape[2]
    for b in range(k.shape[0]):
        base = 0 if k_base is None else int(k_base[b])
        length = int(kv_len[b])
        for s in range(k.shape[2]):
            p = int(q_start[b]) + s
            if max(0, base, length - capacity) <= p < length:
                k_cache[b, :, (p - base) % capacity] = k[b, :, s].to(k_cache.dtype)
                v_cache[b, :, (p - base) % capacity] = v[b, :, s].to(v_cache.dtype)


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    k_base: Tensor | None = None,
) -> Tensor:
    """:func:`rope`, then :func:`cache_write` of the rotated k and of v; gives the rotated q."""
    wide = _compute_dtype(k)
    q_rotated, _ = rope(q, k, cos, sin)
    _, k_rotated = rope(q, k.to(wide), cos, sin)
    cache_write(k_cache, v_cache, k_rotated, v, q_start, kv_len, k_base)
    return q_rotated


def visible(
    q_start: Tensor,
    q_length: int,
    kv_len: Tensor,
    capacity: int,
    kv_start: Tensor | None = None,
    k_base: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Who sees whom: bool ``[B, Sq, C]``, True where the query column sees the key in the slot.

    The position in slot c is the largest one below ``kv_len`` that is congruent to it modulo C.
    """
    base = torch.zeros_like(kv_len) if k_base is None else k_base
    slots = torch.arange(capacity, device=kv_len.device)
    last = (kv_len - 1 - base).unsqueeze(1)  # [B, 1], relative to the base
    j = (last - (last - slots) % max(capacity, 1) + base.unsqueeze(1)).unsqueeze(1)  # [B, 1, C]
    p = (q_start.unsqueeze(1) + torch.arange(q_length, device=kv_len.device)).unsqueeze(2)
    first = base.clamp(min=0)[:, None, None]
    seen = (j <= p) & (j < kv_len[:, None, None]) & (j >= first)
    if kv_start is not None:
        seen = seen & (j >= kv_start.unsqueeze(2))
    if window > 0:
        seen = seen & (j > p - window)
    return seen


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Capped, then masked scores ``[B, Hq, Sq, C]``: bool masks hide where False."""
    wide = _compute_dtype(q)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(wide) @ k.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return (scores + mask.to(wide)).masked_fill(mask <= -1e9, -math.inf)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax whose rows without a visible key are 0, with gradient 0, instead of NaN."""
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def attention_weights(
    q: Tensor,
    k: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None = None,
    k_base: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """The probabilities of :func:`attention`, ``[B, Hq, Sq, C]`` by slot, in the compute dtype."""
    if mask is None:
        mask = visible(q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, window)[:, None]
    return _softmax(_scores(q, k, mask, scale, softcap))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None = None,
    k_base: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    deterministic: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-capped, windowed, grouped-query attention: ``(out, lse)`` of the operator.

    Args:
        mask: replaces the visibility rule by ``[B or 1, Hq or 1, Sq, C]``: bool (True = visible) or
            additive (values <= -1e9 hide).
    """
    if mask is None:
        mask = visible(q_start, q.shape[2], kv_len, k.shape[2], kv_start, k_base, window)[:, None]
    scores = _scores(q, k, mask, scale, softcap)
    wide = scores.dtype
    group = q.shape[1] // k.shape[1]
    hidden = ~(scores > -math.inf).any(2).any(1)  # slots nobody sees may hold anything, NaN too
    values = v.to(wide).masked_fill(hidden[:, None, :, None], 0.0).repeat_interleave(group, dim=1)
    out = _softmax(scores) @ values
    return out.to(q.dtype), torch.logsumexp(scores, dim=-1).float()


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up``, rounded once."""
    wide = _compute_dtype(gate)
    return (torch.nn.functional.gelu(gate.to(wide), approximate="tanh") * up.to(wide)).to(
        gate.dtype
    )


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, rounded once."""
    return (cap * torch.tanh(x.to(_compute_dtype(x)) / cap)).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, accumulated wide, rounded once."""
    wide = _compute_dtype(x)
    return (x.to(wide) @ weight.to(wide).T).to(x.dtype)


def philox(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of counters int64 ``[.., 4]``, as four 32-bit words in int64 ``[.., 4]``."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & low, (seed >> 32) & low

    def mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        # In halves: int64 has no room for an unsigned 64-bit product.
        bottom, top = a * (b & 0xFFFF), a * (b >> 16)
        middle = top + (bottom >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (bottom & 0xFFFF)

    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = mulhilo(0xD2511F53, c0), mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=-1)


def gumbel(rows: int, vocab: int, seed: int, step: Tensor | int) -> Tensor:
    """The noise of :func:`sample`, float64 ``[rows, vocab]``; see csrc/common/philox.h."""
    steps = torch.as_tensor(step, device="cpu").expand(rows)[:, None]
    index = torch.arange(-(-vocab // 4))
    row = torch.arange(rows)[:, None].expand(-1, len(index))
    halves = [half.expand_as(row) for half in (steps & 0xFFFFFFFF, (steps >> 32) & 0xFFFFFFFF)]
    counter = torch.stack([index.expand_as(row), row, *halves], dim=-1)
    uniform = (philox(counter, seed).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform.flatten(1)[:, :vocab]))


def kept_scores(
    logits: Tensor,
    history: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """The scores that :func:`sample` draws from, ``[B, V]``: -inf where nothing may be drawn."""
    x = logits.to(_compute_dtype(logits))
    if history is not None:
        seen = torch.zeros_like(x, dtype=torch.bool)
        for b, tokens in enumerate(history):
            seen[b, tokens[tokens >= 0]] = True
        x = torch.where(seen, torch.where(x < 0, x * repetition_penalty, x / repetition_penalty), x)
    if temperature == 0:
        return x
    x = (x / temperature).double()
    if 0 < top_k < x.shape[1]:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -math.inf)
    weight = (x - x.amax(-1, keepdim=True)).exp()
    if top_p < 1:
        order = x.sort(dim=-1, stable=True).indices.flip(-1)  # of equal ones the last comes first
        ordered = weight.gather(-1, order)
        before = ordered.cumsum(-1) - ordered
        dropped = before >= top_p * ordered.sum(-1, keepdim=True)
        x = x.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    if min_p > 0:
        x = x.masked_fill(weight < min_p, -math.inf)
    return x


def sample(
    logits: Tensor,
    history: Tensor | None,
    seed: int,
    step: Tensor | int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Repetition penalty, temperature, top-k, top-p, min-p, then Gumbel-max (0: greedy)."""
    filters = (temperature, top_k, top_p, min_p, repetition_penalty)
    scores = kept_scores(logits, history, *filters)
    if temperature == 0:
        return scores.argmax(-1)
    noise = gumbel(scores.shape[0], scores.shape[1], seed, step).to(scores.device)
    return (scores + noise).argmax(-1)
