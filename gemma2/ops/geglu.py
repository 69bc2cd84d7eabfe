"""The gated activation of Gemma's MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up``, in float32, rounded once.

    Shazeer 2020 (arXiv 2002.05202), with the tanh form of GELU (arXiv 1606.08415).

    Args:
        gate, up: ``[.., width]``, of one shape and dtype: float32, bfloat16 or float16.

    Returns:
        ``[.., width]`` in the same dtype.

    Raises:
        ValueError: shapes or dtypes differ, or are not float ones.
    """
    return library.geglu(gate, up)


@torch.library.register_fake("gemma2::geglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    x, g = gate.float(), grad.float()
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (x + 0.044715 * x**3))
    gelu = 0.5 * x * (1 + t)
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)
    return (g * up.float() * slope).to(gate.dtype), (g * gelu).to(up.dtype)


torch.library.register_autograd("gemma2::geglu", _backward, setup_context=_setup)
