"""geglu: gelu_tanh(gate) * up, against torch's two steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops


def cases() -> list[dict[str, Any]]:
    return [
        {"rows": rows, "width": width, "dtype": dtype}
        for width in (9216, 36864)
        for dtype in ("float32", "bfloat16")
        for rows in (1, 512)
    ]


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    dtype, shape = getattr(torch, case["dtype"]), (case["rows"], case["width"])
    draw = Draw(device)
    moved = 3 * case["rows"] * case["width"] * dtype.itemsize
    inputs = Inputs(lambda: draw.normal(2, *shape).to(dtype).unbind(), moved, device)
    return {
        "ours": inputs.call(ops.geglu),
        "torch": inputs.call(eager),
        "compile": inputs.call(compiled(eager)),
        "bytes": moved,
        **inputs.note,
    }
