"""Rotary position embedding: the tables, the rotation, and the rotation into the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library, refuse_gradients


def rope_table(position_ids: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """``(cos, sin)`` of ``position_ids * theta^(-2i / head_dim)``, computed in float32.

    Su et al. 2021 (arXiv 2104.09864), section 3.2.2.

    Args:
        position_ids: int64 ``[B, S]``.
        head_dim: D, even.
        theta: the base of the frequencies.

    Returns:
        Two float32 tensors ``[B, S, D / 2]``.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    inv_freq = 1.0 / theta ** (exponent / head_dim)
    angle = position_ids.unsqueeze(-1).float() * inv_freq
    return angle.cos(), angle.sin()


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates halves: ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)``, in float32, rounded once.

    Args:
        q: ``[B, Hq, S, D]``; any strides with a dense last dimension.
        k: ``[B, Hkv, S, D]``, in q's dtype.
        cos, sin: float32 ``[B or 1, S, D / 2]``, from :func:`rope_table`.

    Returns:
        q and k rotated, contiguous.

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
    """:func:`rope` and :func:`gemma2.ops.cache_write` in one pass: k is rotated into its slot.

    Arguments and slots as there. For inference.

    Returns:
        q rotated, contiguous ``[B, Hq, S, D]``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; nothing has been written.
        RuntimeError: grad mode is on and an argument requires grad.
    """
    refuse_gradients("rope_cache", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    return library.rope_cache(q, k, v, cos, sin, k_cache, v_cache, q_start, kv_len, k_base)


@torch.library.register_fake("gemma2::rope")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("gemma2::rope_cache")
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
    _, _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    # The inverse of a rotation is the rotation by the opposite angle. No gradient goes to the tables:
    # they are functions of integers.
    cos, sin = ctx.saved_tensors
    return *library.rope(_dense_last(grad_q), _dense_last(grad_k), cos, -sin), None, None


def _dense_last(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()


torch.library.register_autograd("gemma2::rope", _backward, setup_context=_setup)
