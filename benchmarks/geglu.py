"""geglu: gelu_tanh(gate) * up, against torch's two steps."""

from __future__ import annotations

from typing import Any

import torch

from gemma2 import ops


def cases() -> list[dict[str, Any]]:
    return [
        {"rows": rows, "width": width, "dtype": dtype}
        for width in (9216, 36864)
        for dtype in ("float32", "bfloat16")
        for rows in (1, 512)
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    gate, up = torch.randn(2, case["rows"], case["width"]).to(dtype)
    return {
        "ours": lambda: ops.geglu(gate, up),
        "torch": lambda: torch.nn.functional.gelu(gate, approximate="tanh") * up,
        "bytes": 3 * gate.numel() * gate.element_size(),
    }
