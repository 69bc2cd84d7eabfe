"""sample: capped logits to tokens, against transformers' processors and torch.multinomial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma2 import ops


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


def transformers_call(
    logits: Tensor, history: Tensor, options: dict[str, Any]
) -> Callable[[], Tensor]:
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

    def call() -> Tensor:
        scores = logits.float()
        for step in steps:
            scores = step(history, scores)
        if greedy:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1)

    return call


def run(case: dict[str, Any]) -> dict[str, Any]:
    logits = ops.softcap(torch.randn(case["rows"], 256000) * 3, 30.0)
    logits = logits.to(getattr(torch, case["dtype"]))
    history = torch.randint(0, 256000, (case["rows"], 512))
    step = torch.zeros((), dtype=torch.int64)
    return {
        "ours": lambda: ops.sample(logits, history, 0, step, **case["options"]),
        "transformers": transformers_call(logits, history, case["options"]),
        "bytes": logits.numel() * logits.element_size(),
    }
