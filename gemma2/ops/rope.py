"""Rotary position embedding: the table, the rotation, and the rotation straight into a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library, refuse_gradients, register_fake


def rope_table(
    position_ids: Tensor, head_dim: int, theta: float = 10000.0, inv_freq: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``cos(p f_i), sin(p f_i)`` with ``f_i = theta^(-2 i / D)``, for i < D/2, in float32.

    Su et al. 2021 (arXiv 2104.09864), eq. 15. Angles are products in float32, as in transformers.

    Args:
        position_ids: int64 ``[B, S]``.
        head_dim: D, even.
        theta: base of the frequencies.
        inv_freq: float32 ``[D/2]``, used instead of the formula.

    Returns:
        cos and sin, float32 ``[B, S, D/2]``.

    Raises:
        ValueError: head_dim is odd, or inv_freq has another length than D/2.
    """
    if head_dim % 2 != 0 or head_dim <= 0:
        raise ValueError(f"rope_table: head_dim is {head_dim}: an even positive number is wanted")
    if inv_freq is None:
        exponent = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
        inv_freq = 1.0 / (theta**exponent)
    if inv_freq.shape != (head_dim // 2,):
        raise ValueError(
            f"rope_table: inv_freq has shape {list(inv_freq.shape)}: "
            f"[D/2] = [{head_dim // 2}] is wanted"
        )
    angle = position_ids.float().unsqueeze(-1) * inv_freq.float()
    return angle.cos(), angle.sin()


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the halves of every head: ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)``.

    x1 is the first half of a head, x2 the second (Su et al. 2021, arXiv 2104.09864, in the layout
    of Gemma's checkpoints). In float32, rounded once.

    Args:
        q: ``[B, Hq, S, D]``, float32, bfloat16 or float16, D even, any strides with a dense last
            dimension.
        k: ``[B, Hkv, S, D]``, of the same dtype.
        cos, sin: float32 ``[B or 1, S, D/2]``, see :func:`rope_table`. They get no gradient.

    Returns:
        The rotated q and k, contiguous, in their dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    return library.rope(q, k, cos, sin)


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
    """:func:`rope`, then :func:`cache_write` of the rotated k and of v, in one pass. For inference.

    The rotated k is rounded once, to the cache's dtype. Where that is k's own dtype, the bits are
    those of the two operators.

    Args:
        q, k, cos, sin: as for :func:`rope`.
        v, k_cache, v_cache, q_start, kv_len, k_base: as for :func:`cache_write`.

    Returns:
        The rotated q, ``[B, Hq, S, D]``, contiguous, in q's dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; nothing has been written then.
        RuntimeError: grad mode is on and an argument requires grad.
    """
    refuse_gradients("rope_cache", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    return library.rope_cache(q, k, v, cos, sin, k_cache, v_cache, q_start, kv_len, k_base)


@register_fake("rope")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@register_fake("rope_cache")
def _(
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
    return q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation is the rotation by the opposite angle."""
    cos, sin = ctx.saved_tensors
    return *library.rope(grad_q.contiguous(), grad_k.contiguous(), cos, -sin), None, None


torch.library.register_autograd("gemma2::rope", _backward, setup_context=_setup)
