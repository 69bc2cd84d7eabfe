"""softcap: cap * tanh(x / cap), against torch's three steps."""

from __future__ import annotations

from typing import Any

import torch

from gemma2 import ops


def cases() -> list[dict[str, Any]]:
    return [
        {"rows": rows, "vocab": 256000, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
        for rows in (1, 8)
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    x = (torch.randn(case["rows"], case["vocab"]) * 30).to(getattr(torch, case["dtype"]))
    return {
        "ours": lambda: ops.softcap(x, 30.0),
        "torch": lambda: torch.tanh(x / 30.0) * 30.0,
        "bytes": 2 * x.numel() * x.element_size(),
    }
