"""The cap on the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, in float32, rounded once (Gemma 2 report, section 2).

    Args:
        x: any shape, float32, bfloat16 or float16.
        cap: a positive number; 30 for Gemma 2's logits.

    Returns:
        As x.

    Raises:
        ValueError: cap is not positive, or the dtype is not a float one.
    """
    return library.softcap(x, cap)


@torch.library.register_fake("gemma2::softcap")
def _(x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    t = torch.tanh(x.float() / ctx.cap)
    return (grad.float() * (1 - t * t)).to(x.dtype), None


torch.library.register_autograd("gemma2::softcap", _backward, setup_context=_setup)
