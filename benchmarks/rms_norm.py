"""rms_norm and the seam add_rms_norm_, against transformers' eager module and torch's rms_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
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


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    dtype, shape = getattr(torch, case["dtype"]), (case["rows"], case["hidden"])
    draw = Draw(device)
    post, pre = draw.normal(2, case["hidden"]).to(dtype)
    size = case["rows"] * case["hidden"] * dtype.itemsize
    if case["op"] == "rms_norm":
        inputs = Inputs(lambda: (draw.normal(*shape).to(dtype),), 2 * size, device)
        return {
            "ours": inputs.call(lambda x: ops.rms_norm(x, pre, EPS)),
            "eager": inputs.call(lambda x: eager(x, pre)),
            "torch": inputs.call(lambda x: torch_norm(x, pre)),
            "compile": inputs.call(compiled(lambda x: eager(x, pre))),
            "bytes": 2 * size,
            **inputs.note,
        }

    def eager_seam(residual: Tensor, x: Tensor) -> Tensor:
        return eager(residual.add_(eager(x, post)), pre)

    def torch_seam(residual: Tensor, x: Tensor) -> Tensor:
        return torch_norm(residual.add_(torch_norm(x, post)), pre)

    def ours(residual: Tensor, x: Tensor) -> Tensor:
        return ops.add_rms_norm_(residual, x, post, pre, EPS)

    inputs = Inputs(lambda: draw.normal(2, *shape).to(dtype).unbind(), 4 * size, device)
    return {
        "ours": inputs.call(ours),
        "eager": inputs.call(eager_seam),
        "torch": inputs.call(torch_seam),
        "compile": inputs.call(compiled(eager_seam)),
        "bytes": 4 * size,
        **inputs.note,
    }
