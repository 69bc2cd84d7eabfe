"""The gated activation of Gemma's MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library, register_fake


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up``, in float32, rounded once.

    ``gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``: GEGLU of Shazeer 2020
    (arXiv 2002.05202) with the tanh form of gelu (Hendrycks and Gimpel, arXiv 1606.08415).

    Args:
        gate, up: ``[.., F]`` of one shape and dtype: float32, bfloat16 or float16.

    Returns:
        ``[.., F]`` in the same dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes differ, or the dtype is not a float one.
    """
    return library.geglu(gate, up)


@register_fake("geglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    gate32, grad32 = gate.float(), grad.float()
    grad_up = grad32 * torch.nn.functional.gelu(gate32, approximate="tanh")
    grad_gate = torch.ops.aten.gelu_backward(grad32 * up.float(), gate32, approximate="tanh")
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


torch.library.register_autograd("gemma2::geglu", _backward, setup_context=_setup)
