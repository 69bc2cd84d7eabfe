"""From logits to the next token: the options of generation bound to the operator `sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.generation.config import GenerationConfig
from gemma2.generation.processors import Processors, warped

__all__ = ["Sampler", "resolve_seed"]

_MAX_SEED = 2**63 - 1


def resolve_seed(seed: int | None) -> int:
    """Give `seed`, or one drawn from torch's default generator, which `torch.manual_seed` sets.

    Raises:
        TypeError, ValueError: seed is not an int in [0, 2**63).
    """
    if seed is None:
        return int(torch.randint(_MAX_SEED, (), dtype=torch.int64, device="cpu"))
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"generate: seed is {seed!r}: it must be an int in [0, 2**63), or None")
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"generate: seed is {seed}: it must be an int in [0, 2**63), or None")
    return seed


class Sampler:
    """Chooses tokens, the same ones for the same seed, row, step and logits.

    A step is the index of a token among the new ones of its row. All state is on the device and
    changed in place.

    Args:
        options: decides among greedy and sampling, and how.
        seed: key of the random numbers; not used when greedy. None draws one.
        text: int64 [N, L], each row's prompt from column 0 on, then -1, with room for the new
            tokens; what depends on the text reads it. None: nothing does.
        lengths: int64 [N], where a row's new tokens begin in `text`.
        processors: what `ops.sample` cannot do; None: nothing.
        columns: int64 [N, S + T], the prompts as given, then pads with room for the new tokens, as
            functions of the user see them. None: there are none.
        prompt_columns: S.
    """

    def __init__(
        self,
        options: GenerationConfig,
        seed: int | None,
        text: Tensor | None,
        lengths: Tensor,
        processors: Processors | None = None,
        columns: Tensor | None = None,
        prompt_columns: int = 0,
    ) -> None:
        self.temperature = options.temperature if options.do_sample else 0.0
        self._filters = (options.top_k, options.top_p, options.min_p)
        self._penalty = options.repetition_penalty
        self.seed = resolve_seed(seed) if self.temperature > 0 or seed is not None else 0
        self.text = text
        self.lengths = lengths
        self._processors = processors
        self._columns, self._prompt_columns = columns, prompt_columns

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens before it, beyond the logits."""
        return self._processors is not None or self._penalty != 1.0

    def draw(self, logits: Tensor, step: Tensor) -> Tensor:
        """Give a token for each row, int64 [N], of capped logits [N, V].

        Args:
            step: int64 [N], the index of that token.
        """
        if self._processors is None:
            return self._sample(logits, step, self.text, self._penalty)
        return self.choose(self.processed(logits, step), step)

    def processed(self, logits: Tensor, step: Tensor) -> Tensor:
        """Give the scores float32 [N, V] of logits: all that comes before the temperature."""
        assert self._processors is not None
        known = self.lengths + step
        return self._processors(
            logits, step, self.text, known, lambda: self.columns(int(step.max()))
        )

    def choose(self, scores: Tensor, step: Tensor) -> Tensor:
        """Give a token for each row, int64 [N], of processed scores [N, V]."""
        return self._sample(scores, step, None, 1.0)

    def _sample(self, scores: Tensor, step: Tensor, text: Tensor | None, penalty: float) -> Tensor:
        top_k, top_p, min_p = self._filters if self.temperature > 0 else (0, 1.0, 0.0)
        return ops.sample(
            scores,
            text if penalty != 1.0 else None,
            self.seed,
            step,
            self.temperature,
            min(top_k, scores.shape[-1]),
            top_p,
            min_p,
            penalty,
        )

    def warped(self, scores: Tensor, least: int = 1) -> Tensor:
        """Give processed scores [N, V] after temperature and filters; at least `least` are kept."""
        if self.temperature == 0:
            return scores
        return warped(scores, self.temperature, *self._filters, least)

    def columns(self, count: int) -> Tensor:
        """Give the prompts as given and `count` new tokens of each row, int64 [N, S + count]."""
        assert self._columns is not None
        return self._columns[:, : self._prompt_columns + count]

    def note(self, tokens: Tensor, step: Tensor) -> None:
        """Keep tokens int64 [N, n] as those of the steps from `step` [N] on; -1 is none."""
        if self.text is None and self._columns is None:
            return
        place = step[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if self.text is not None:
            self.text.scatter_(1, self.lengths[:, None] + place, tokens)
        if self._columns is not None:
            there = place + self._prompt_columns
            kept = torch.where(tokens < 0, self._columns.gather(1, there), tokens)
            self._columns.scatter_(1, there, kept)

    def reorder(self, source: Tensor) -> None:
        """Put what is known of row source[i] in row i; prompts of these rows are the same."""
        for kept in (self.text, self._columns):
            if kept is not None:
                kept.copy_(kept[source])
