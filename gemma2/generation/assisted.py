"""Assisted decoding: tokens are drafted cheaply, and the model checks several of them in one call.

The model draws a token of its own after each drafted one, with the numbers that belong to that token's
place in the text, and a drafted token is accepted iff it is the token drawn there. So the text is what
the model writes without assistance, sampled or not, up to rounding: a call of several tokens may
round logits otherwise than a call of one (Leviathan et al. 2023, arXiv 2211.17192, accept by a coin
instead, which keeps the distribution but not the text).

A drafting model draws with the same random numbers. As the token drawn is the argmax of logits plus
noise, the same noise makes two models whose logits are alike draw the same token mostly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2.generation.run import Run
from gemma2.generation.step import Step
from gemma2.ring import readable

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["AssistedStep", "look_up"]


class AssistedStep(Step):
    """Drafts tokens, reads the last token and the drafted ones, and keeps what is right.

    Rows keep different numbers of them. All rows are written to the caches, those that have ended
    too, and the lengths are put back: the caches have room and margin for that.

    Where the host can look, it drafts no more tokens than promise to be right: twice as many after
    a step in which all were, one more than were right after others. A wrong one costs its share of
    a call. On a device each step drafts as many as it may, for the host must not wait.
    """

    def __init__(self, model: GenerationMixin, run: Run) -> None:
        assert run.draft is not None
        assert run.sampler.text is not None
        super().__init__(model, run, run.draft.count + 1)
        self.draft, self.text = run.draft, run.sampler.text
        self.ahead = run.draft.count  # tokens that the next step drafts

    def __call__(self) -> None:
        """Append at least one token to every row that has not ended."""
        cache = self.run.cache
        before = cache.lengths[: self.count.shape[0]].clone()
        try:
            drafts = self._draft_by_model(before) if self.draft.reading else self._draft_by_text()
            drawn, right = self._check(drafts)
            new = self.keep(drawn, right & ~self.finished[:, None])
        except BaseException:
            cache.rewind(before, self.run.longest)  # to the text as it is
            raise
        cache.rewind(before + new, self.run.longest)
        if readable(new):
            accepted = int(new.max()) - 1
            hoped = 2 * self.ahead if accepted == self.ahead else max(accepted, 0) + 1
            self.ahead = min(hoped, self.draft.count)

    def _draft_by_model(self, before: Tensor) -> Tensor:
        """Give the draft model's continuation, int64 [N, k]."""
        reading, sampler = self.draft.reading, self.run.sampler
        assert reading is not None
        # It reads two tokens first, because the last drafted one, if right, has not been read yet.
        reading.cache.rewind(before - 1, self.run.longest)
        last = sampler.lengths + self.count - 1
        ids = self.text.gather(1, torch.stack([last - 1, last], dim=1))
        drafts = []
        for ahead in range(self.ahead):
            logits = reading.model(
                input_ids=ids, past_key_values=reading.cache, use_cache=True, logits_to_keep=1
            ).logits
            ids = sampler.draw(logits[:, -1], self.count + ahead).clamp(min=0)[:, None]
            if sampler.looks_back:
                sampler.note(ids, self.count + ahead)
            drafts.append(ids)
        found = torch.cat(drafts, dim=1)
        if sampler.looks_back:
            sampler.note(torch.full_like(found, -1), self.count)
        return found

    def _draft_by_text(self) -> Tensor:
        """Give what followed where the text's end occurred before, int64 [N, k]."""
        known = self.run.sampler.lengths + self.count
        return look_up(self.text, known, self.ahead, self.draft.ngram)

    def _check(self, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """Give the tokens drawn by the model [N, k + 1], and which stand after right ones only."""
        logits = self.model(
            input_ids=torch.cat([self.tokens[:, None], drafts], dim=1),
            past_key_values=self.run.cache,
            use_cache=True,
        ).logits
        sampler, rows = self.run.sampler, logits.shape[0]
        if sampler.temperature == 0 and not sampler.looks_back and self.run.record is None:
            # the most probable tokens need no random numbers, so one call finds them all
            steps = self.count.new_zeros(rows * logits.shape[1])
            chosen = sampler.draw(logits.flatten(0, 1), steps).view(rows, -1)
        else:
            drawn = [self.draw(logits[:, 0])]
            for ahead in range(drafts.shape[1]):
                if sampler.looks_back:
                    sampler.note(drafts[:, ahead : ahead + 1], self.count + ahead)
                drawn.append(self.draw(logits[:, ahead + 1], ahead + 1))
            chosen = torch.stack(drawn, dim=1)
        right = (chosen[:, :-1] == drafts).to(torch.int64).cumprod(dim=1) == 1
        return chosen, F.pad(right, (1, 0), value=True)

    def replayed(self) -> None:
        """Do nothing: the host has counted the longest text that there can be."""


def look_up(text: Tensor, known: Tensor, count: int, ngram: int) -> Tensor:
    """Give what followed an earlier occurrence of a text's end, int64 [N, count].

    Of up to `ngram` last tokens, as many as occur before decide; of several occurrences, the last
    one. A text that has just repeated itself is taken to go on so. Without an occurrence the result
    is the text's beginning (Saxena 2023, "prompt lookup decoding").

    Args:
        text: int64 [N, L], from column 0 on.
        known: int64 [N], tokens in each row of it, at least one.
    """
    columns = text.shape[1]
    place = torch.arange(columns, device=text.device)  # of the token after an occurrence
    follower = torch.zeros_like(known)
    same = place < known[:, None]
    for back in range(1, min(ngram, columns) + 1):
        wanted = text.gather(1, (known - back).clamp(min=0)[:, None])
        shifted = F.pad(text, (back, 0), value=-1)[:, :columns]
        same = same & (shifted == wanted) & (known >= back)[:, None]
        last = (same * place).amax(dim=1)
        follower = torch.where(last > 0, last, follower)
    period = (known - follower)[:, None]
    ahead = torch.arange(count, device=text.device)
    return text.gather(1, follower[:, None] + ahead % period)
