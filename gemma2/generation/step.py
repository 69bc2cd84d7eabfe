"""One step of generation as a function on fixed tensors: nothing in it makes the host wait.

The state (the last tokens, which rows have ended, how many tokens each has) is changed in place, and
no decision is taken in Python, so that the step can be captured in a CUDA graph and replayed. What
the host wants to know is left in `report`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.generation.prepare import Run

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["NO_TOKEN", "Step"]

# In a report: no new token. -1 and -2 stand for a row of logits at fault, as `ops.sample` gives them.
NO_TOKEN = -3


class Step:
    """Reads one token a row and chooses the next one.

    Attributes:
        report: int64 [N, n + 1]: up to n new tokens of each row, and whether it has ended.
    """

    def __init__(self, model: GenerationMixin, run: Run, width: int = 1) -> None:
        rows, device = run.prompt.shape[0], run.prompt.device
        self.model, self.run = model, run
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.count = torch.zeros_like(self.tokens)
        self.finished = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.report = torch.zeros((rows, width + 1), dtype=torch.int64, device=device)

    def take(self, logits: Tensor) -> None:
        """Choose the next token of each row from its logits [N, V]."""
        run = self.run
        drawn = run.sampler.draw(logits, self.count)
        fault = (drawn < 0) & ~self.finished
        self.report.fill_(NO_TOKEN)
        self.report[:, 0].copy_(drawn.masked_fill(self.finished, NO_TOKEN))
        # a number that is no token would stop the embedding's kernel
        tokens = drawn.clamp(min=0).masked_fill(self.finished, run.pad)
        run.sampler.note(tokens[:, None], self.count)
        self.tokens.copy_(tokens)
        self.count += ~self.finished
        # after a fault the text goes no further in any row, until the host has seen it
        self.finished |= (self.count >= run.new_tokens) | fault.any()
        if run.eos is not None:
            self.finished |= (tokens[:, None] == run.eos).any(dim=1)
        self.report[:, -1].copy_(self.finished)

    def __call__(self) -> None:
        """Read the last token of each row, except where it has ended, and choose the next one."""
        logits = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=(~self.finished)[:, None],
            past_key_values=self.run.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.take(logits[:, -1])

    def replayed(self) -> None:
        """Do on the host what a call does there beside the device's work."""
        self.run.cache.advance(1)

    def bound(self) -> list[Tensor]:
        """Give the tensors of the cache that a call works on: others mean another graph."""
        return self.run.cache.tensors()
