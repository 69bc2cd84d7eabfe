"""embed: rows of the table times sqrt(hidden), against torch's two steps."""

from __future__ import annotations

from typing import Any

import torch

from gemma2 import ops


def cases() -> list[dict[str, Any]]:
    return [
        {"tokens": tokens, "hidden": hidden, "dtype": dtype}
        for hidden in (2304, 4608)
        for dtype in ("float32", "bfloat16")
        for tokens in (1, 512)
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype, hidden = getattr(torch, case["dtype"]), case["hidden"]
    weight = torch.randn(32000, hidden).to(dtype)
    ids = torch.randint(0, 32000, (case["tokens"],))
    scale = torch.tensor(hidden**0.5, dtype=dtype)
    return {
        "ours": lambda: ops.embed(ids, weight, hidden**0.5),
        "torch": lambda: torch.nn.functional.embedding(ids, weight) * scale,
        "bytes": 2 * ids.numel() * hidden * weight.element_size(),
    }
