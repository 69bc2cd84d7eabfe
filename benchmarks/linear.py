"""The linear layers of Gemma 2 2B at 1 to 1024 rows, against torch's product.

`ours` is what the model calls, which takes torch's product where that is faster; `kernel` is our
kernel in its fixed order, which deterministic algorithms take at any number of rows. torch.compile is
no peer here: it makes the same call of the same library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.check import Check
from benchmarks.timing import Draw, Inputs
from gemma2 import ops

COLD_BYTES = 128 << 20  # of weights, taken in turns, as a model's layers are


def cases() -> list[dict[str, Any]]:
    return [
        {"rows": rows, "n": n, "k": k, "dtype": dtype}
        for n, k in ((9216, 2304), (2304, 9216))
        for dtype in ("float32", "bfloat16", "float16")
        for rows in (1, 4, 16, 64, 256, 1024)
    ]


def cuda_cases() -> list[dict[str, Any]]:
    """gate and up, down, the head, q, k and v, o; decode's rows first."""
    shapes = ((9216, 2304), (2304, 9216), (256000, 2304), (2048, 2304), (1024, 2304), (2304, 2048))
    return [
        {"rows": rows, "n": n, "k": k, "dtype": "bfloat16"}
        for some in ((1, 8, 64), (2, 4, 16, 512))
        for n, k in shapes
        for rows in some
    ]


def tiny(case: dict[str, Any]) -> dict[str, Any]:
    """Give a GPU's case at a size for any CPU."""
    return {**case, "n": case["n"] // 128, "k": case["k"] // 16}


def peak_bytes(case: dict[str, Any]) -> int:
    """Give an upper bound of what a GPU must hold at once for the case."""
    weight = case["n"] * case["k"] * getattr(torch, case["dtype"]).itemsize
    # In float32 while it is drawn and for the exact result.
    return 3 * max(weight, 256 << 20) + 20 * case["rows"] * (case["n"] + case["k"])


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    rows, n, k = case["rows"], case["n"], case["k"]
    dtype = getattr(torch, case["dtype"])
    draw = Draw(device)
    x = draw.normal(rows, k).to(dtype)
    weight_bytes = n * k * x.element_size()
    inputs = Inputs(lambda: (draw.normal(n, k).to(dtype),), weight_bytes, device, COLD_BYTES)

    def exact() -> Tensor:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        return x.to(wide) @ inputs.sets[0][0].to(wide).T

    return {
        "ours": inputs.call(lambda weight: ops.linear(x, weight)),
        "kernel": inputs.call(lambda weight: torch.ops.gemma2.linear(x, weight)),
        "torch": inputs.call(lambda weight: F.linear(x, weight)),
        "check": Check(exact, dtype),
        "checked": ("ours", "kernel", "torch"),
        "flop": 2 * rows * n * k if rows > 1 else None,
        "bytes": weight_bytes if rows <= 16 else None,
        **inputs.note,
    }
