"""sample: capped logits to tokens, against transformers' processors and torch.multinomial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Draw, Inputs, compiled
from gemma2 import ops, reference

VOCAB = 256000


def cases() -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"top_k": 50},
        {"top_k": 256},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"top_k": 64, "top_p": 0.95},
        {"repetition_penalty": 1.2, "top_k": 50},
    ]
    return [
        {"rows": rows, "dtype": dtype, "options": option}
        for rows, dtype in ((1, "float32"), (1, "bfloat16"), (8, "bfloat16"))
        for option in options
    ]


def transformers_call(options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """What transformers' generate does with a step's logits."""
    from transformers.generation import logits_process as lp

    makers = {
        "repetition_penalty": lp.RepetitionPenaltyLogitsProcessor,
        "temperature": lp.TemperatureLogitsWarper,
        "top_k": lp.TopKLogitsWarper,
        "top_p": lp.TopPLogitsWarper,
        "min_p": lp.MinPLogitsWarper,
    }
    greedy = options.get("temperature") == 0.0
    steps = [] if greedy else [makers[name](options[name]) for name in makers if name in options]

    def call(logits: Tensor, history: Tensor) -> Tensor:
        scores = logits.float()
        for step in steps:
            scores = step(history, scores)
        if greedy:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1)

    return call


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    rows, dtype, options = case["rows"], getattr(torch, case["dtype"]), case["options"]
    draw = Draw(device)
    step = torch.zeros((), dtype=torch.int64, device=device)

    def draw_set() -> tuple[Tensor, Tensor]:
        logits = reference.softcap(draw.normal(rows, VOCAB) * 3, 30.0).to(dtype)
        return logits, draw.integers(VOCAB, rows, 512)

    def ours(logits: Tensor, history: Tensor) -> Tensor:
        return ops.sample(logits, history, 0, step, **options)

    moved = rows * VOCAB * dtype.itemsize
    inputs = Inputs(draw_set, moved, device)
    calls: dict[str, Any] = {"ours": inputs.call(ours)}
    try:
        theirs = transformers_call(options)
        calls["transformers"] = inputs.call(theirs)
        calls["compile"] = inputs.call(compiled(theirs))
    except ImportError as error:
        calls["transformers"] = inputs.call(_refuse(error))
    return {**calls, "bytes": moved, **inputs.note}


def _refuse(error: Exception) -> Callable[..., object]:
    def refuse(*_: object) -> object:
        raise error

    return refuse
