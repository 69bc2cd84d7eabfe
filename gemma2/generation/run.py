"""What `prepare` makes of a call of `generate`, and the loop runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gemma2.cache import HybridCache
from gemma2.generation.record import Record
from gemma2.generation.sampling import Sampler

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin
    from gemma2.generation.stopping import Stops

__all__ = ["Beams", "Draft", "Reading", "Run"]


@dataclass
class Reading:
    """What the cache of a model does not hold of the prompts yet.

    pending: int64 [B, P], or [B, P, hidden_size], padded at the left; `repeats` copies of each row
        are made after it has been read: N = B repeats.
    mask: bool [B, P], True = token; None: all are.
    chunk: columns read at a time.
    texts: the tokens of the B prompts, for a cache that is to know them.
    keep: whether the cache is to keep a snapshot of the prompts' end.
    """

    model: GenerationMixin
    cache: HybridCache
    pending: Tensor
    mask: Tensor | None
    repeats: int
    chunk: int
    texts: list[list[int]] | None = None
    keep: bool = False


@dataclass
class Draft:
    """How tokens are drafted: `count` of them a step, by a model or by looking them up in the text.

    reading: of the model that drafts; None: tokens are looked up.
    ngram: tokens at the text's end that are looked up, at most.
    """

    count: int
    reading: Reading | None
    ngram: int


@dataclass
class Beams:
    """How texts are searched for: K = `count` of them a prompt at a time, `returned` in the end.

    least: candidates that filters leave for each text when sampling.
    candidates: continuations of a prompt's texts that are looked at in each step.
    """

    count: int
    returned: int
    length_penalty: float
    early_stopping: bool | str
    least: int
    candidates: int


@dataclass
class Run:
    """One call of generate, checked and ready to go.

    prompt: int64 [N, S], what stands before the new tokens in the output; S is 0 for inputs_embeds.
    lengths: tokens of the prompts, one for each of the N rows.
    prompts: these tokens; None: they are embeddings, or the cache is nobody's afterwards.
    is_kept: whether somebody has the cache afterwards.
    as_dict: whether the result is a `GenerateOutput`.
    others: tokens in the longest of the cache's rows that are not in the batch.
    longest: tokens that the longest row of the cache can come to have.
    graph: whether the step is captured and replayed.
    draft: None: the model writes without assistance.
    beams: None: each row is one text.
    stops: ends of a text that the host looks for; None: there are none.
    waits: whether the host has to see each step's tokens before the next one.
    record: what is kept of the scores; None: nothing.
    """

    prompt: Tensor
    reading: Reading
    new_tokens: int
    lengths: list[int]
    prompts: list[list[int]] | None
    is_kept: bool
    as_dict: bool
    others: int
    longest: int
    sampler: Sampler
    eos: Tensor | None
    pad: int
    graph: bool
    draft: Draft | None
    beams: Beams | None
    stops: Stops | None
    waits: bool
    record: Record | None
    training: list[nn.Module]

    @property
    def cache(self) -> HybridCache:
        """The cache of the model that writes."""
        return self.reading.cache
