"""What changes the scores of all tokens before one of them is chosen.

Operations on tensors of fixed shapes, with the history of a row in a tensor that stays, so that a
step can be captured in a CUDA graph; except for functions of the user, which the host calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2 import reference
from gemma2.generation.config import GenerationConfig

__all__ = ["Processors", "forbid_ngrams", "penalize", "warped"]

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Processors:
    """Repetition penalty, n-grams, suppressed tokens, minimal length, functions: in this order.

    penalty: of repeated tokens; 1 is none.
    ngram: tokens that do not occur twice in this order; 0: no such rule.
    suppressed: bool [V], tokens that are never generated.
    ends: bool [V], tokens that end a text, which are not generated before `least` new ones.
    functions: called as `f(input_ids, scores)`.
    """

    penalty: float
    ngram: int
    suppressed: Tensor | None
    ends: Tensor | None
    least: int
    functions: Sequence[Function] = field(default=())

    @classmethod
    def of(
        cls,
        options: GenerationConfig,
        columns: int,
        functions: Sequence[Function],
        vocab: int,
        device: torch.device,
    ) -> Processors:
        """Give what `options` ask for. `columns`: of the prompt, which min_length counts too."""
        least = options.min_new_tokens
        if least is None:
            least = max(options.min_length - columns, 0)
        ends = options.eos_token_ids if least else []
        return cls(
            options.repetition_penalty,
            options.no_repeat_ngram_size,
            _marked(options.suppress_tokens or [], vocab, device),
            _marked(ends, vocab, device),
            least,
            functions,
        )

    @property
    def only_penalty(self) -> bool:
        """Whether there is nothing that `ops.sample` does not do by itself."""
        return not (self.ngram or self.functions) and self.suppressed is None and self.ends is None

    @property
    def reads_text(self) -> bool:
        """Whether the tokens of a row have to be known."""
        return self.penalty != 1.0 or self.ngram > 0

    def __call__(
        self,
        logits: Tensor,
        step: Tensor,
        text: Tensor | None,
        known: Tensor,
        columns: Callable[[], Tensor],
    ) -> Tensor:
        """Give the scores float32 [N, V] of logits [N, V], which stay as they are.

        Args:
            step: int64 [N], how many new tokens a row has.
            text, known: int64 [N, L] and [N], the tokens of a row and how many there are.
            columns: gives what functions see as input_ids.
        """
        scores = logits.to(torch.float32, copy=True)
        if self.penalty != 1.0 and text is not None:
            scores = penalize(scores, text, self.penalty)
        if self.ngram and text is not None:
            scores = forbid_ngrams(scores, text, known, self.ngram)
        if self.suppressed is not None:
            scores = scores.masked_fill(self.suppressed, -math.inf)
        if self.ends is not None:
            scores = scores.masked_fill(self.ends & (step < self.least)[:, None], -math.inf)
        for number, function in enumerate(self.functions):
            scores = _checked(function(columns(), scores), scores, number)
        return scores


def _checked(found: object, scores: Tensor, number: int) -> Tensor:
    name = f"generate: logits_processor[{number}]"
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} gave a {type(found).__name__}: it must give the scores, a tensor")
    if found.shape != scores.shape:
        raise ValueError(
            f"{name} gave scores of shape {list(found.shape)}: it must be {list(scores.shape)}"
        )
    return found.to(scores.device, torch.float32)


def _marked(tokens: Sequence[int], vocab: int, device: torch.device) -> Tensor | None:
    """Give bool [V] that is True for `tokens`; None if there are none."""
    if not tokens:
        return None
    marks = torch.zeros(vocab, dtype=torch.bool)
    marks[torch.tensor(tokens)] = True
    return marks.to(device)


def _occurring(text: Tensor, vocab: int) -> Tensor:
    """Give bool [N, V], which tokens a row of `text` has; -1 is none."""
    marks = torch.zeros((text.shape[0], vocab + 1), dtype=torch.bool, device=text.device)
    return marks.scatter_(1, torch.where(text < 0, vocab, text), True)[:, :vocab]


def penalize(scores: Tensor, text: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative scores [N, V] of tokens in `text` [N, L] by penalty."""
    lower = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_occurring(text, scores.shape[1]), lower, scores)


def forbid_ngrams(scores: Tensor, text: Tensor, known: Tensor, n: int) -> Tensor:
    """Set scores [N, V] to -inf for tokens that would end a row with n tokens that it has already.

    Args:
        text, known: int64 [N, L] and [N], the tokens of a row and how many there are.
    """
    columns = text.shape[1]
    # of a token in the text: whether what stands before it stands at the text's end, too
    place = torch.arange(columns, device=text.device)
    follows = (place >= n - 1) & (place < known[:, None])
    for back in range(1, min(n, columns + 1)):
        wanted = text.gather(1, (known - back).clamp(min=0)[:, None])
        follows = follows & (F.pad(text, (back, 0), value=-1)[:, :columns] == wanted)
    return scores.masked_fill(
        _occurring(text.masked_fill(~follows, -1), scores.shape[1]), -math.inf
    )


def warped(
    scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, least: int = 1
) -> Tensor:
    """Give the scores float32 [N, V] after temperature, top-k, top-p, min-p: -inf where dropped.

    As the operator `sample` applies them, for who needs the scores themselves.

    Args:
        least: tokens that are kept in any case, those with the largest scores.
    """
    vocab = scores.shape[1]
    top_k = min(max(top_k, least), vocab) if top_k else 0
    kept = reference.kept_scores(scores, None, temperature, top_k, top_p, min_p).to(torch.float32)
    if least > 1 and (top_p < 1.0 or min_p > 0.0):
        best = scores.topk(min(least, vocab))
        kept.scatter_(1, best.indices, best.values / temperature)
    return kept
