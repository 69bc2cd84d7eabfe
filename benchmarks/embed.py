"""embed: rows of the table times sqrt(hidden), against torch's two steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops

ROWS = 32000


def cases() -> list[dict[str, Any]]:
    return [
        {"tokens": tokens, "hidden": hidden, "dtype": dtype}
        for hidden in (2304, 4608)
        for dtype in ("float32", "bfloat16")
        for tokens in (1, 512)
    ]


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    dtype, hidden, tokens = getattr(torch, case["dtype"]), case["hidden"], case["tokens"]
    draw = Draw(device)
    weight = draw.normal(ROWS, hidden).to(dtype)
    scale = torch.tensor(hidden**0.5, dtype=dtype, device=device)

    def eager(ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, weight) * scale

    moved = 2 * tokens * hidden * weight.element_size()
    inputs = Inputs(lambda: (draw.integers(ROWS, tokens),), moved, device)
    return {
        "ours": inputs.call(lambda ids: ops.embed(ids, weight, hidden**0.5)),
        "torch": inputs.call(eager),
        "compile": inputs.call(compiled(eager)),
        "bytes": moved,
        **inputs.note,
    }
