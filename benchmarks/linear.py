"""The linear layers of Gemma 2 2B at 1 to 1024 rows, against torch's product.

`ours` is what the model calls, which takes torch's product where that is faster; `kernel` never does.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from gemma2 import ops

COLD_BYTES = 128 << 20  # of weights, taken in turns, as a model's layers are


def cases() -> list[dict[str, Any]]:
    return [
        {"rows": rows, "n": n, "k": k, "dtype": dtype}
        for n, k in ((9216, 2304), (2304, 9216))
        for dtype in ("float32", "bfloat16", "float16")
        for rows in (1, 4, 16, 64, 256, 1024)
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    rows, n, k = case["rows"], case["n"], case["k"]
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(rows, k).to(dtype)
    weight_bytes = n * k * x.element_size()
    copies = -(-COLD_BYTES // weight_bytes)
    weights = itertools.cycle([torch.randn(n, k).to(dtype) for _ in range(copies)])
    return {
        "ours": lambda: ops.linear(x, next(weights)),
        "kernel": lambda: torch.ops.gemma2.linear(x, next(weights)),
        "torch": lambda: F.linear(x, next(weights)),
        "flop": 2 * rows * n * k if rows > 1 else None,
        "bytes": weight_bytes if rows <= 16 else None,
    }
