"""Loads the compiled operators into ``torch.ops.gemma2``; what their Python faces share."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.parent / "_ops.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"gemma2: {_LIBRARY} is missing: the package was not built. "
        "Run `pip install .` (or `make dev`) in the source tree."
    )
torch.ops.load_library(str(_LIBRARY))

# The compiled operators, which every face calls through this namespace.
library = torch.ops.gemma2


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
