"""rms_norm and the seam add_rms_norm_, against transformers' eager module and torch's rms_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2 import ops

EPS = 1e-6


def cases() -> list[dict[str, Any]]:
    return [
        {"op": op, "rows": rows, "hidden": hidden, "dtype": dtype}
        for op in ("rms_norm", "add_rms_norm_")
        for hidden in (2304, 4608)
        for dtype in ("float32", "bfloat16")
        for rows in (1, 512)
    ]


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Gemma2RMSNorm does it."""
    wide = x.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (out * (1.0 + weight.float())).type_as(x)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], 1.0 + weight, EPS)


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    x, residual = torch.randn(2, case["rows"], case["hidden"]).to(dtype)
    post, pre = torch.randn(2, case["hidden"]).to(dtype)
    if case["op"] == "rms_norm":
        return {
            "ours": lambda: ops.rms_norm(x, pre, EPS),
            "eager": lambda: eager(x, pre),
            "torch": lambda: torch_norm(x, pre),
            "bytes": 2 * x.numel() * x.element_size(),
        }
    return {
        "ours": lambda: ops.add_rms_norm_(residual, x, post, pre, EPS),
        "eager": lambda: eager(residual + eager(x, post), pre),
        "torch": lambda: torch_norm(residual + torch_norm(x, post), pre),
        "bytes": 4 * x.numel() * x.element_size(),
    }
