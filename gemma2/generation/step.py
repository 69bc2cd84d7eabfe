"""One step of generation as a function on fixed tensors: nothing in it makes the host wait.

The state (the last tokens, which rows have ended, how many tokens each has) is changed in place, and
no decision is taken in Python, so that the step can be captured in a CUDA graph and replayed. What
the host wants to know is left in `report`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.generation.run import Run

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["NO_TOKEN", "Step"]

# In a report: no new token. -1 and -2 stand for a row of logits at fault, as `ops.sample` gives them.
NO_TOKEN = -3


class Step:
    """Reads one token a row and chooses the next one.

    Attributes:
        tokens: int64 [N], the last token of each row.
        count: int64 [N], how many new tokens each row has.
        finished: bool [N], rows that have ended.
        report: int64 [N, n + 1]: up to n new tokens of each row, and whether it has ended.
    """

    def __init__(self, model: GenerationMixin, run: Run, width: int = 1) -> None:
        rows, device = run.prompt.shape[0], run.prompt.device
        self.model, self.run = model, run
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.count = torch.zeros_like(self.tokens)
        self.finished = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.report = torch.zeros((rows, width + 1), dtype=torch.int64, device=device)

    def begin(self, logits: Tensor) -> None:
        """Choose the first token of each row from the logits [N, V] after its prompt."""
        drawn = self.draw(logits)
        self.keep(drawn[:, None], (~self.finished)[:, None])

    def __call__(self) -> None:
        """Read the last token of each row, except where it has ended, and choose the next one."""
        going_on = (~self.finished)[:, None]
        logits = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=going_on,
            past_key_values=self.run.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        drawn = self.draw(logits[:, -1])
        self.keep(drawn[:, None], going_on)

    def draw(self, logits: Tensor, ahead: int = 0) -> Tensor:
        """Give a token for each row of logits [N, V], its next but `ahead`, and record from what."""
        sampler, step = self.run.sampler, self.count + ahead if ahead else self.count
        if self.run.record is None:
            return sampler.draw(logits, step)
        scores = sampler.processed(logits, step)
        self.run.record.put(ahead, logits=logits, scores=sampler.warped(scores))
        return sampler.choose(scores, step)

    def keep(self, drawn: Tensor, kept: Tensor) -> Tensor:
        """Append the tokens `drawn` [N, n] to each row where `kept` [N, n]; give how many, [N].

        Kept are the first tokens of a row, and fewer of them where the text ends.
        """
        run, width = self.run, drawn.shape[1]
        ends = torch.zeros_like(kept)
        if run.eos is not None:
            ends = (drawn[..., None] == run.eos).any(dim=-1)
        if width > 1:
            before = ends.cumsum(dim=1) - ends.to(torch.int64)
            place = self.count[:, None] + torch.arange(width, device=drawn.device)
            kept = kept & (before == 0) & (place < run.new_tokens)
        self.report.fill_(NO_TOKEN)
        self.report[:, :width].copy_(drawn.masked_fill(~kept, NO_TOKEN))
        fault = kept & (drawn < 0)
        # a number that is no token would stop the embedding's kernel
        tokens = drawn.clamp(min=0)
        run.sampler.note(tokens.masked_fill(~kept, -1), self.count)
        new = kept.sum(dim=1)
        last = tokens.gather(1, (new - 1).clamp(min=0)[:, None])[:, 0]
        self.tokens.copy_(torch.where(new > 0, last, self.tokens))
        self.count += new
        # after a fault the text goes no further in any row, until the host has seen it
        self.finished |= (self.count >= run.new_tokens) | fault.any()
        self.finished |= (ends & kept).any(dim=1)
        self.report[:, -1].copy_(self.finished)
        return new

    def replayed(self) -> None:
        """Do on the host what a call does there beside the device's work."""
        self.run.cache.advance(1)

    def bound(self) -> list[Tensor]:
        """Give the tensors of the cache that a call works on: others mean another graph."""
        return self.run.cache.tensors()
