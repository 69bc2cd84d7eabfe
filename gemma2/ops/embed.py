"""Token embedding: rows of the table times the rounded square root of the hidden size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.ops._library import library, register_fake


def embed(ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``weight[ids] * round(scale)``, where round is to the weight's dtype: the residual stream.

    Gemma 2 multiplies embeddings by sqrt(hidden_size) held in the weight's dtype (59.87 becomes
    59.75 in bfloat16), and the published weights expect that. The product is float32, rounded once.

    Args:
        ids: int64, any shape ``[..]``.
        weight: ``[V, H]``, float32, bfloat16 or float16.
        scale: sqrt(hidden_size), unrounded.

    Returns:
        ``[.., H]``: bfloat16 for a bfloat16 weight, float32 otherwise.

    Raises:
        ValueError: ids is not int64 or holds a value outside ``[0, V)``, weight is not a matrix of
            a float dtype with dense rows, or scale is not finite. (On a CUDA device an id outside
            the table stops the kernel instead: to see it here, the host would have to wait.)
    """
    return library.embed(ids, weight, scale)


def _out_dtype(weight: Tensor) -> torch.dtype:
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32


@register_fake("embed")
def _(ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=_out_dtype(weight))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, weight, scale = inputs
    ctx.save_for_backward(ids)
    ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
    ctx.scale = torch.tensor(scale, dtype=weight.dtype, device="cpu").item()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    # Summed in float32: a frequent token's gradient is a sum of thousands of rows.
    scaled = grad.float() * ctx.scale
    grad_weight = torch.ops.aten.embedding_dense_backward(scaled, ids, ctx.rows, -1, False)
    return None, grad_weight.to(ctx.dtype), None


torch.library.register_autograd("gemma2::embed", _backward, setup_context=_setup)
