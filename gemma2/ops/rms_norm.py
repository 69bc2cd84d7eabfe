"""RMS normalisation with Gemma's ``1 + w``, alone and as the seam between two sub-layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library, refuse_gradients, register_fake


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * (1 + weight)``, in float32, rounded once.

    Zhang and Sennrich 2019 (arXiv 1910.07467); the ``1 +`` is Gemma's.

    Args:
        x: ``[.., H]``, float32, bfloat16 or float16.
        weight: ``[H]``, one of the same dtypes, not necessarily x's.
        eps: added to the mean square.

    Returns:
        ``[.., H]`` in the weight's dtype.

    Raises:
        ValueError: weight does not have one element per element of x's last dimension, or a dtype
            is not a float one.
    """
    return library.rms_norm(x, weight, eps)


def add_rms_norm(
    residual: Tensor, x: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The seam between two sub-layers of Gemma 2: a norm, the residual sum, and the next norm.

    ``h = residual + rms_norm(x, post_weight)``, rounded once to the residual's dtype, and
    ``y = rms_norm(h, pre_weight)``.

    Args:
        residual: the residual stream, ``[.., H]``.
        x: the sub-layer's output, ``[.., H]``.
        post_weight, pre_weight: ``[H]``, of one dtype.
        eps: added to both mean squares.

    Returns:
        ``(h, y)``: h in the residual's dtype, y in the weights' dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return library.add_rms_norm(residual, x, post_weight, pre_weight, eps)


def add_rms_norm_(
    residual: Tensor, x: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> Tensor:
    """:func:`add_rms_norm` that overwrites ``residual`` with h and gives y. For inference.

    Raises:
        ValueError: shapes or dtypes do not fit, or residual is not contiguous.
        RuntimeError: grad mode is on and an argument requires grad.
    """
    refuse_gradients(
        "add_rms_norm_", residual=residual, x=x, post_weight=post_weight, pre_weight=pre_weight
    )
    return library.add_rms_norm_(residual, x, post_weight, pre_weight, eps)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


@register_fake("add_rms_norm")
def _(
    residual: Tensor, x: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), x.new_empty(x.shape, dtype=post_weight.dtype)


@register_fake("add_rms_norm_")
def _(residual: Tensor, x: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=post_weight.dtype)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx = inv (g - n mean(g n)) with n = x inv and g = grad (1 + w); dw = sum grad n."""
    x32, grad32 = x.float(), grad.float()
    inv = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed = x32 * inv
    grad_weight = (grad32 * normed).flatten(0, -2).sum(0) if x.dim() > 1 else grad32 * normed
    grad_normed = grad32 * (1.0 + weight.float())
    grad_x = inv * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
    return grad_x, grad_weight


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = _norm_backward(grad, x, weight, ctx.eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


torch.library.register_autograd(
    "gemma2::rms_norm", _rms_norm_backward, setup_context=_rms_norm_setup
)


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    residual, x, post_weight, pre_weight, ctx.eps = inputs
    ctx.residual_dtype = residual.dtype
    ctx.save_for_backward(x, post_weight, pre_weight, output[0])


def _add_rms_norm_backward(ctx: Any, grad_h: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, post_weight, pre_weight, h = ctx.saved_tensors
    grad_sum, grad_pre = _norm_backward(grad_y, h, pre_weight, ctx.eps)
    grad_sum = grad_sum + grad_h.float()
    grad_x, grad_post = _norm_backward(grad_sum, x, post_weight, ctx.eps)
    return (
        grad_sum.to(ctx.residual_dtype),
        grad_x.to(x.dtype),
        grad_post.to(post_weight.dtype),
        grad_pre.to(pre_weight.dtype),
        None,
    )


torch.library.register_autograd(
    "gemma2::add_rms_norm", _add_rms_norm_backward, setup_context=_add_rms_norm_setup
)
