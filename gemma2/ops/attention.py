"""Attention as Gemma 2 does it: soft-capped scores, grouped heads, windows, over a ring or a buffer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gemma2 import reference
from gemma2.ops._library import library, register_fake

_NATIVE_HEAD_DIMS = (64, 128, 256)
_warned: set[str] = set()
# The backward holds a few float32 matrices [heads, rows, keys] at once; each has at most this many elements.
_BACKWARD_ELEMENTS = 1 << 24


def _why_reference(q: Tensor) -> str:
    """Why the kernel cannot serve q; empty if it can."""
    if q.shape[-1] in _NATIVE_HEAD_DIMS:
        return ""
    return f"head_dim {q.shape[-1]} has no kernel (64, 128 and 256 have)"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None = None,
    k_base: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(mask(softcap * tanh(scale * q k^T / softcap))) v`` and the log-sum-exp of the scores.

    Gemma 2 report (arXiv 2408.00118), section 2; the cap comes before the mask. Scores, softmax and
    sums are float32 whatever the dtypes. One meaning for training, prefill, chunks and decode:

    A *position* counts a row's real tokens. Column s of q has position ``q_start[b] + s``, negative for
    left pads and ``>= kv_len[b]`` for right pads. Position j lies in slot ``(j - k_base[b]) mod C``. The
    query at position p sees key j iff ``max(0, kv_start, k_base) <= j <= p``, ``j < kv_len`` and, with a
    window, ``j > p - window`` (the window counts the token itself). A buffer holds the last C
    positions below ``kv_len``. A query that sees no key gives out 0, lse -inf and no gradient. Slots
    that nobody sees may hold anything.

    Args:
        q: ``[B, Hq, Sq, D]``, float32, bfloat16 or float16, any strides with a dense last dimension.
        k, v: ``[B, Hkv, C, D]``, Hq a multiple of Hkv; one dtype, not necessarily q's.
        q_start: int64 ``[B]``, position of column 0.
        kv_len: int64 ``[B]``, real tokens of the row, this call's included.
        kv_start: int64 ``[B, Sq]``, first position of the query's own document.
        k_base: int64 ``[B]``, position of slot 0 of a linear buffer; None (0) for a ring.
        k_scale, v_scale: float32 ``[B, Hkv, C]`` of int8 caches, which are not supported yet.
        scale: multiplies ``q k``.
        softcap: 0 for none.
        window: 0 for none.
        deterministic: makes a row's bits independent of batch, padding, chunking and threads. (The
            same call gives the same bits in any case.)

    Returns:
        out ``[B, Hq, Sq, D]`` in q's dtype, and lse float32 ``[B, Hq, Sq]``, the natural logarithm of
        the sum of exponentials of the visible capped scores.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, ``softcap < 0`` or ``window < 0``.

    Head dims other than 64, 128 and 256 run through :mod:`gemma2.reference`, which is said once.
    """
    if _why_reference(q) and q.dim() == k.dim() == v.dim() == 4:
        return _attention_by_reference(
            q, k, v, q_start, kv_len, kv_start, k_base, k_scale, v_scale, scale, softcap, window
        )
    return library.attention(
        q,
        k,
        v,
        q_start,
        kv_len,
        kv_start,
        k_base,
        k_scale,
        v_scale,
        scale=scale,
        softcap=softcap,
        window=window,
        deterministic=deterministic,
    )


def _attention_by_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None,
    k_base: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    head_dim, q_heads, kv_heads = q.shape[3], q.shape[1], k.shape[1]
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if given is not None:
            raise ValueError(f"attention: {name} is given: int8 caches are not supported yet")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != head_dim:
        raise ValueError(
            f"attention: k has shape {list(k.shape)}, v has shape {list(v.shape)}, q has shape "
            f"{list(q.shape)}: k and v must be alike and share q's batch and head_dim"
        )
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(
            f"attention: k has {kv_heads} heads, q has {q_heads}: the number of query heads must be a "
            "multiple of the number of key/value heads"
        )
    if softcap < 0 or window < 0:
        raise ValueError(
            f"attention: softcap is {softcap}, window is {window}: positive numbers are wanted, or 0 "
            "for none"
        )
    why = _why_reference(q)
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"attention: {why}: using the reference, which is slower", stacklevel=3)
    return reference.attention(
        q, k, v, q_start, kv_len, kv_start, k_base, scale=scale, softcap=softcap, window=window
    )


@register_fake("attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    kv_start: Tensor | None = None,
    k_base: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, q_heads, q_length, head_dim = q.shape
    out = q.new_empty((batch, q_length, q_heads, head_dim)).transpose(1, 2)
    return out, q.new_empty((batch, q_heads, q_length), dtype=torch.float32)


@register_fake("attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))  # type: ignore[return-value]


@torch.library.impl("gemma2::attention_backward", "default")
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by recomputing the probabilities, in matrix products, a piece at a time.

    With raw scores s = scale q k, t = tanh(s / cap), p = softmax(mask(cap t)) and dp = dout v:
    ds = p (dp - sum(p dp) + dlse) (1 - t^2). p is 0 where masked, so the cap's derivative never meets an
    infinity.
    """
    batch, q_heads, q_length, head_dim = q.shape
    kv_heads, capacity = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    row = q_heads * q_length * capacity  # score elements of one row of the batch
    rows = max(1, _BACKWARD_ELEMENTS // row)
    columns = q_length if rows > 1 else max(1, _BACKWARD_ELEMENTS // (q_heads * capacity))
    for b in range(0, batch, rows):
        in_batch = slice(b, min(batch, b + rows))
        n = in_batch.stop - b
        base = None if k_base is None else k_base[in_batch]
        for c in range(0, q_length, columns):
            at = slice(c, min(q_length, c + columns))
            m = at.stop - c
            seen = reference.visible(
                q_start[in_batch] + c,
                m,
                kv_len[in_batch],
                capacity,
                None if kv_start is None else kv_start[in_batch, at],
                base,
                window,
            )
            # What nobody sees may hold NaN: 0 times it must stay 0.
            dead = ~seen.any(1)[:, None, :, None]
            keys = k[in_batch].to(wide).masked_fill(dead, 0.0).flatten(0, 1)
            values = v[in_batch].to(wide).masked_fill(dead, 0.0).flatten(0, 1)

            def grouped(
                x: Tensor, n: int = n, m: int = m
            ) -> Tensor:  # [n, Hq, m, D] -> [n Hkv, G m, D]
                return x.to(wide).reshape(n * kv_heads, group * m, -1)

            queries = grouped(q[in_batch, :, at])
            douts = grouped(grad_out[in_batch, :, at])
            t = queries @ keys.transpose(1, 2)
            if softcap > 0:
                t = t.mul_(scale / softcap).tanh_()
                p = t * softcap
            else:
                p = t.mul_(scale)
            hidden = ~seen[:, None, None]  # [n, 1, 1, m, C]
            shaped = p.view(n, kv_heads, group, m, capacity).masked_fill_(hidden, -torch.inf)
            # A row without a key: -inf - (-inf) must not become NaN.
            highest = shaped.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
            p = shaped.sub_(highest).exp_().view(n * kv_heads, group * m, capacity)
            p.div_(p.sum(-1, keepdim=True).clamp_(min=torch.finfo(wide).tiny))
            dv[in_batch].view(n * kv_heads, capacity, head_dim).baddbmm_(p.transpose(1, 2), douts)
            ds = douts @ values.transpose(1, 2)
            shift = (p * ds).sum(-1, keepdim=True)
            if grad_lse is not None:
                shift = shift - grouped(grad_lse[in_batch, :, at, None])
            ds = ds.sub_(shift).mul_(p)
            if softcap > 0:
                ds = ds.mul_(t.square_().neg_().add_(1.0))
            ds = ds.mul_(scale)
            dq[in_batch, :, at] = (ds @ keys).view(n, q_heads, m, head_dim)
            dk[in_batch].view(n * kv_heads, capacity, head_dim).baddbmm_(
                ds.transpose(1, 2), queries
            )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    q, k, v, q_start, kv_len, kv_start, k_base, _, _ = inputs
    ctx.save_for_backward(q, k, v, q_start, kv_len, kv_start, k_base)
    ctx.options = {name: keyword_only_inputs[name] for name in ("scale", "softcap", "window")}
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, q_start, kv_len, kv_start, k_base = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(q)
    grads = library.attention_backward(
        grad_out, grad_lse, q, k, v, q_start, kv_len, kv_start, k_base, **ctx.options
    )
    return (*grads, None, None, None, None, None, None)


torch.library.register_autograd("gemma2::attention", _backward, setup_context=_setup)
