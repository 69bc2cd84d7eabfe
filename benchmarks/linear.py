"""The linear layers of Gemma 2 2B at 1 to 1024 rows, against torch's product.

`ours` is what the model calls, which takes torch's product where that is faster; `kernel` never does.
torch.compile is no peer here: it makes the same call of the same library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

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


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    rows, n, k = case["rows"], case["n"], case["k"]
    dtype = getattr(torch, case["dtype"])
    draw = Draw(device)
    x = draw.normal(rows, k).to(dtype)
    weight_bytes = n * k * x.element_size()
    inputs = Inputs(lambda: (draw.normal(n, k).to(dtype),), weight_bytes, device, COLD_BYTES)
    return {
        "ours": inputs.call(lambda weight: ops.linear(x, weight)),
        "kernel": inputs.call(lambda weight: torch.ops.gemma2.linear(x, weight)),
        "torch": inputs.call(lambda weight: F.linear(x, weight)),
        "flop": 2 * rows * n * k if rows > 1 else None,
        "bytes": weight_bytes if rows <= 16 else None,
        **inputs.note,
    }
