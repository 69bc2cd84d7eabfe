"""Gradients and compiled calls are those of eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.transformers.twins import WINDOW, config, truth
from tests.model import factories as F


def gradients(gemma: Any, **inputs: Any) -> dict[str, Tensor]:
    gemma.train()
    gemma(**inputs).loss.backward()
    return {k: v.grad for k, v in gemma.named_parameters() if v.grad is not None}


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_gradients_equal_eagers(side: str) -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 7)], side)
    # a pad's guess at the first token is nobody's: eager gives a mean of the keys it may not see
    guessed = (mask == 0) | (mask.cumsum(1) == 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(guessed, -100)}
    if side == "packed":
        ids = ids[:1]
        position_ids = torch.cat([torch.arange(8), torch.arange(ids.shape[1] - 8)])[None]
        inputs = {"input_ids": ids, "position_ids": position_ids, "labels": ids}
    ours, theirs = (
        gradients(F.twin(config(), attention=a), use_cache=False, **inputs)
        for a in ("gemma2", "eager")
    )
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < 2e-5, f"{name}: {error:.1e}"


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = F.tokens(2, 2 * WINDOW + 3)
    usual = gradients(F.twin(config(), attention="gemma2"), input_ids=ids, labels=ids)
    gemma = F.twin(config(), attention="gemma2")
    gemma.gradient_checkpointing_enable()
    again = gradients(gemma, input_ids=ids, labels=ids)
    for name, gradient in usual.items():
        assert torch.equal(again[name], gradient), name


@torch.no_grad()
def test_compiled_calls_equal_eager() -> None:
    gemma = F.twin(config(), attention="gemma2")
    run = torch.compile(gemma, fullgraph=True, backend="aot_eager")
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 7)], "left")
    real = mask.bool()
    logits = run(ids, attention_mask=mask, use_cache=False).logits
    assert F.relative_error(logits[real], truth("27b", ids, mask)[real]) < 1e-5
    n = ids.shape[1]
    position_ids = torch.cat([torch.arange(8), torch.arange(n - 8)])[None]
    logits = run(ids[:1], position_ids=position_ids, use_cache=False).logits
    apart = [truth("27b", part) for part in (ids[:1, :8], ids[:1, 8:])]
    assert F.relative_error(logits, torch.cat(apart, dim=1)) < 1e-5
    holes = mask.clone()
    holes[0, 5] = 0
    with pytest.raises(RuntimeError, match="padding between real tokens"):
        run(ids, attention_mask=holes, use_cache=False)
