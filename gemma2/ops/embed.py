"""The start of the residual stream: rows of the embedding table, scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library


def embed(ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``weight[ids] * scale``, with ``scale`` first rounded to the weight's dtype.

    The rounding is part of the model: sqrt(2304) = 48 is exact, sqrt(3584) = 59.87 is 59.75 in bfloat16.

    Args:
        ids: int64, any shape.
        weight: ``[V, H]``, float32, bfloat16 or float16.
        scale: sqrt(hidden_size) in Gemma.

    Returns:
        ``[.., H]``: bfloat16 for bfloat16 weights, float32 otherwise.

    Raises:
        ValueError: an id outside of the table, or a wrong shape or dtype.
    """
    return library.embed(ids, weight, scale)


@torch.library.register_fake("gemma2::embed")
def _(ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, weight, scale = inputs
    ctx.save_for_backward(ids)
    ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
    ctx.scale = torch.tensor(scale, dtype=weight.dtype).float().item()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    summed = torch.ops.aten.embedding_dense_backward(grad.float(), ids, ctx.rows, -1, False)
    return None, (summed * ctx.scale).to(ctx.dtype), None


torch.library.register_autograd("gemma2::embed", _backward, setup_context=_setup)
