"""The product of a linear layer, without bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2.ops._library import library


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, accumulated in float32, rounded once.

    The package's kernel where it is the fast one: always for few rows, where reading the weights is the
    limit. Torch's product for many rows where that is fast on this machine and dtype, unless
    ``torch.are_deterministic_algorithms_enabled()``: in the kernel a row's bits do not depend on the
    other rows.

    Args:
        x: ``[.., K]``, float32, bfloat16 or float16.
        weight: ``[N, K]``, the same dtype, as ``nn.Linear`` holds it.

    Returns:
        ``[.., N]`` in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if _torch_is_faster(x, weight) and not torch.are_deterministic_algorithms_enabled():
        return F.linear(x, weight)
    return library.linear(x, weight)


# Rows of x from which torch's product is at least as fast as the kernel, by dtype; absent: never.
_TORCH_FROM_ROWS: dict[torch.dtype, int] = {torch.float32: 16}


def _torch_is_faster(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != weight.dtype or weight.dim() != 2 or x.dim() < 1:
        return False  # for the kernel's own error
    if x.shape[-1] != weight.shape[1] or x.shape[-1] == 0:
        return False
    from_rows = _TORCH_FROM_ROWS.get(x.dtype)
    return from_rows is not None and x.numel() >= from_rows * x.shape[-1]


@torch.library.register_fake("gemma2::linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])
    grad_x = (rows @ weight).reshape(x.shape) if ctx.needs_input_grad[0] else None
    grad_weight = rows.t() @ x.reshape(-1, weight.shape[1]) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


torch.library.register_autograd("gemma2::linear", _backward, setup_context=_setup)
