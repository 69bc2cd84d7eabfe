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
    """Chooses one token a row and step, the same ones for the same seed, step, row and logits.

    Args:
        options: decides among greedy and sampling, and how.
        seed: key of the random numbers; not used when greedy. None draws one.
        prompt: int64 [B, S], -1 where there is no token; what the repetition penalty knows of.
        steps: how many tokens will be chosen at most.
    """

    def __init__(
        self, options: GenerationConfig, seed: int | None, prompt: Tensor, steps: int
    ) -> None:
        self._temperature = options.temperature if options.do_sample else 0.0
        self._filters = (options.top_k, options.top_p, options.min_p)
        self._penalty = options.repetition_penalty
        self._seed = resolve_seed(seed) if self._temperature > 0 or seed is not None else 0
        self._history: Tensor | None = None
        if self._penalty != 1.0:
            room = prompt.new_full((prompt.shape[0], steps), -1)
            self._history = torch.cat([prompt, room], dim=1)
        self._written = prompt.shape[1]
        self._step = torch.zeros((), dtype=torch.int64, device=prompt.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Give the next token of each row, int64 [B], of capped logits [B, V]."""
        top_k, top_p, min_p = self._filters if self._temperature > 0 else (0, 1.0, 0.0)
        tokens = ops.sample(
            logits,
            self._history,
            self._seed,
            self._step,
            self._temperature,
            min(top_k, logits.shape[-1]),
            top_p,
            min_p,
            self._penalty,
        )
        self._step += 1
        return tokens

    def remember(self, tokens: Tensor) -> None:
        """Note the tokens int64 [B] that have been appended; -1 for a row that has ended."""
        if self._history is not None:
            self._history[:, self._written] = tokens
            self._written += 1
