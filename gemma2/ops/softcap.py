"""Soft-capping of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library, register_fake


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, in float32, rounded once: every element within ``[-cap, cap]``.

    Gemma 2 report (arXiv 2408.00118), section 2.

    Args:
        x: any shape, float32, bfloat16 or float16.
        cap: positive; 30 for Gemma 2's logits.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        ValueError: x is not of a float dtype, or cap is not positive and finite.
    """
    return library.softcap(x, cap)


@register_fake("softcap")
def _(x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    # From x, not from the output, whose rounding would be large against 1 - tanh^2 near the cap.
    slope = 1.0 - torch.tanh(x.float() / ctx.cap).square()
    return (grad.float() * slope).to(x.dtype), None


torch.library.register_autograd("gemma2::softcap", _backward, setup_context=_setup)
