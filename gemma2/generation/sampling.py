"""From logits to the next token: the options of generation bound to the operator `sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.generation.config import GenerationConfig

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
            tokens; what the repetition penalty knows of. None: nobody asks for it.
        lengths: int64 [N], where a row's new tokens begin in `text`.
    """

    def __init__(
        self, options: GenerationConfig, seed: int | None, text: Tensor | None, lengths: Tensor
    ) -> None:
        self._temperature = options.temperature if options.do_sample else 0.0
        self._filters = (options.top_k, options.top_p, options.min_p)
        self._penalty = options.repetition_penalty
        self._seed = resolve_seed(seed) if self._temperature > 0 or seed is not None else 0
        self.text = text
        self.lengths = lengths

    def draw(self, logits: Tensor, step: Tensor) -> Tensor:
        """Give a token for each row, int64 [N], of capped logits [N, V].

        Args:
            step: int64 [N], the index of that token.
        """
        top_k, top_p, min_p = self._filters if self._temperature > 0 else (0, 1.0, 0.0)
        return ops.sample(
            logits,
            self.text if self._penalty != 1.0 else None,
            self._seed,
            step,
            self._temperature,
            min(top_k, logits.shape[-1]),
            top_p,
            min_p,
            self._penalty,
        )

    def note(self, tokens: Tensor, step: Tensor) -> None:
        """Keep tokens int64 [N, n] as those of the steps from `step` [N] on."""
        if self.text is not None:
            column = (self.lengths + step)[:, None]
            column = column + torch.arange(tokens.shape[1], device=tokens.device)
            self.text.scatter_(1, column, tokens)
