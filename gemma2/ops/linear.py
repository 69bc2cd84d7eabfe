"""The product of a linear layer, without bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2 import _C
from gemma2.ops._library import library, register_fake


def _torch_from_rows() -> dict[torch.dtype, int]:
    """Rows of x from which torch's product beats the kernel, by dtype; absent: never.

    Measured on one core of a 2-core EPYC (Zen 4), 9216 x 2304, 2026-11-24, GFLOP/s of the kernel and
    of torch 2.13 at 16, 64, 256 and 1024 rows:

    ======== ============================== ============================
    dtype    kernel                         torch
    ======== ============================== ============================
    float32  57, 89, 101, 100 (AVX2: 48,    34, 56, 80, 85
             74, 85, 82)
    bfloat16 103, 159, 180, 177 (AVX2: 52,  101, 171, 200, 202 (without
             76, 85, 86)                    AVX-512: 0.7)
    float16  52, 89, 97, 83                 1, 3, 11, 43
    ======== ============================== ============================

    The portable kernel has no FMA: there torch leads in float32 as soon as bandwidth is not the limit.
    """
    return {
        "avx512bf16": {torch.bfloat16: 64},
        "portable": {torch.float32: 4},
    }.get(_C.isa(), {})


_TORCH_FROM_ROWS = _torch_from_rows()
# On CUDA our kernel reads 16-bit weights once for up to 16 rows. The threshold is what the kernel is
# made for; it has not been measured on a GPU yet.
_CUDA_FROM_ROWS = {torch.float32: 1, torch.bfloat16: 17, torch.float16: 17}
# Where torch's own product is fast, its autograd is also the shorter way to gradients.
_TORCH_GRADIENTS = (torch.float32, *([torch.bfloat16] if _C.isa() == "avx512bf16" else []))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, accumulated in float32, rounded once.

    The package's kernel, or torch's product for many rows where that is faster on this machine and
    dtype. On CUDA devices the kernel takes up to 16 rows of bfloat16 or float16 (a threshold that is
    not yet measured on a GPU) and cuBLAS the rest, float32, and whatever wants gradients.

    With ``torch.are_deterministic_algorithms_enabled()`` always the kernel, on the CPU and on CUDA, in
    which a row's bits do not depend on the other rows. Gradients then are still torch's products, on
    CUDA cuBLAS's, which is the same in every run (torch asks for ``CUBLAS_WORKSPACE_CONFIG``).

    Args:
        x: ``[.., K]``, float32, bfloat16 or float16.
        weight: ``[N, K]``, the same dtype, as ``nn.Linear`` holds it.

    Returns:
        ``[.., N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    cuda = x.is_cuda
    if (
        weight.is_cuda == cuda  # the kernel's check says it better
        and _torch_is_faster(x, weight, cuda)
        and not torch.are_deterministic_algorithms_enabled()
    ):
        return F.linear(x, weight)
    return library.linear(x, weight)


def _torch_is_faster(x: Tensor, weight: Tensor, cuda: bool) -> bool:
    """Whether torch's product is, on CUDA devices or on this CPU, and nothing is left to complain of."""
    if x.dtype != weight.dtype or weight.dim() != 2 or x.dim() < 1 or x.shape[-1] == 0:
        return False
    if x.shape[-1] != weight.shape[1]:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return x.dtype in (_CUDA_FROM_ROWS if cuda else _TORCH_GRADIENTS)
    from_rows = (_CUDA_FROM_ROWS if cuda else _TORCH_FROM_ROWS).get(x.dtype)
    return from_rows is not None and x.numel() >= from_rows * x.shape[-1]


@register_fake("linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dtype = x.dtype
    # In float32 where torch's product of the narrow dtype is slow.
    wide = dtype if grad.is_cuda or dtype in _TORCH_GRADIENTS else torch.float32
    rows = grad.reshape(-1, weight.shape[0]).to(wide)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ weight.to(wide)).reshape(x.shape).to(dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = (rows.t() @ x.reshape(-1, weight.shape[1]).to(wide)).to(dtype)
    return grad_x, grad_weight


torch.library.register_autograd("gemma2::linear", _backward, setup_context=_setup)
