"""Loads the compiled operators into ``torch.ops.gemma2``; what their Python faces share."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parent.parent / "_ops.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"gemma2: {_LIBRARY} is missing: the package was not built. "
        "Run `pip install .` (or `make dev`) in the source tree."
    )
torch.ops.load_library(str(_LIBRARY))


def _load_cuda() -> str:
    """Hands the kernels of the CUDA library, where there is one, to the operators; why not, else.

    The library is a shared object of its own that knows no torch, so that one build serves every
    torch; it is loaded only where torch has CUDA.
    """
    from gemma2 import _C

    built = _C.build_info()["cuda"]
    if not built:
        return "not in this build: nvcc was not found, or GEMMA2_CUDA was OFF"
    if torch.version.cuda is None:
        return f"in this build ({built}), not loaded: torch {torch.__version__} is without CUDA"
    path = _LIBRARY.with_name("_cuda.so")
    try:
        cuda = ctypes.CDLL(str(path))
    except OSError as error:
        return f"in this build ({built}), not loaded: {error}"
    cuda.gemma2_cuda_trouble.restype = ctypes.c_char_p
    trouble = cuda.gemma2_cuda_trouble()
    if trouble is not None:
        return f"in this build ({built}), not loaded: {trouble.decode()}"
    cuda.gemma2_cuda_kernels.restype = ctypes.c_void_p
    operators = ctypes.CDLL(str(_LIBRARY))
    operators.gemma2_install_kernels(ctypes.c_void_p(cuda.gemma2_cuda_kernels()), False)
    return f"in use ({built})"


# "in use (...)", or why the CUDA kernels are not; `gemma2 info` shows it.
cuda_status = _load_cuda()

# The compiled operators, which every face calls through this namespace.
library = torch.ops.gemma2


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the fake kernel of an operator, for arguments that are all on one device.

    torch calls it, too, where only some tensors are on the device "meta", whose result would be
    memory that nobody has written.
    """

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(fake)

        def checked(*args: Any, **kwargs: Any) -> Any:
            named = signature.bind(*args, **kwargs).arguments
            tensors = [(n, t) for n, t in named.items() if isinstance(t, torch.Tensor)]
            (first, like), *rest = tensors
            for name, tensor in rest:
                if tensor.device != like.device:
                    raise ValueError(
                        f"{op}: {name} is on {tensor.device}, {first} is on {like.device}: they "
                        "must be on the same device"
                    )
            return fake(*args, **kwargs)

        return torch.library.register_fake(f"gemma2::{op}", checked)

    return decorate


def refuse_gradients(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError if autograd would want a gradient through a write in place."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but {op} writes in place and has no backward: "
                "run it under torch.no_grad() or use its functional twin"
            )
