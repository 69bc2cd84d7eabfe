"""softcap: cap * tanh(x / cap), against torch's three steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops

CAP = 30.0


def cases() -> list[dict[str, Any]]:
    return [
        {"rows": rows, "vocab": 256000, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
        for rows in (1, 8)
    ]


def eager(x: Tensor) -> Tensor:
    return torch.tanh(x / CAP) * CAP


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    dtype, shape = getattr(torch, case["dtype"]), (case["rows"], case["vocab"])
    draw = Draw(device)
    moved = 2 * case["rows"] * case["vocab"] * dtype.itemsize
    inputs = Inputs(lambda: ((draw.normal(*shape) * CAP).to(dtype),), moved, device)
    return {
        "ours": inputs.call(lambda x: ops.softcap(x, CAP)),
        "torch": inputs.call(eager),
        "compile": inputs.call(compiled(eager)),
        "bytes": moved,
        **inputs.note,
    }
