"""What the models return: read as attributes, by key, by index, or as a tuple.

The names and their order are those of transformers, so that trainers and evaluation code find what
they look for: `out.loss`, `out["loss"]`, `out[0]`, `out.to_tuple()`, `"loss" in out`,
`dict(out)`. A field that is None is left out of keys, indices and the tuple; it is an attribute all
the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from gemma2.cache import HybridCache

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "GenerateOutput",
    "ModelOutput",
    "SequenceClassifierOutputWithPast",
    "TokenClassifierOutput",
]


class ModelOutput(OrderedDict[str, Any]):
    """A dict of the fields that are not None, which are attributes as well.

    Trainers, data-parallel wrappers and `accelerate` look for a dict, hence the base class. A
    mapping as the only argument sets the fields by name: `type(out)({"logits": x})`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch.export, torch.func and DistributedDataParallel walk outputs as trees of tensors
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        given = {name: getattr(self, name) for name in names}
        first = given[names[0]]
        if isinstance(first, Mapping) and all(given[name] is None for name in names[1:]):
            unknown = set(first) - set(names)
            if unknown:
                raise TypeError(
                    f"{type(self).__name__}: there is no {sorted(map(str, unknown))}: the fields "
                    f"are {names}"
                )
            given = {name: first.get(name) for name in names}
        for name, value in given.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is not None:
            super().__setitem__(name, value)
        elif name in self:
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{type(self).__name__}: fields cannot be deleted, set {name} to None")

    def __reduce__(self) -> Any:
        values = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self), values

    def to_tuple(self) -> tuple[Any, ...]:
        """Give the fields that are not None, in the order of their declaration."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)


@dataclass(repr=False, eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """Output of `Gemma2Model`.

    last_hidden_state: [B, S, hidden_size], after the final norm, in the model's dtype.
    past_key_values: the cache that was passed in or made.
    hidden_states: L + 1 tensors [B, S, hidden_size]: the scaled embeddings, the input of each
        further layer, and `last_hidden_state`.
    attentions: L tensors [B, H, S, columns].
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(repr=False, eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """Output of `Gemma2ForCausalLM`: loss float32 scalar, logits [B, kept, V], already capped."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(repr=False, eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """Output of `Gemma2ForSequenceClassification`: logits [B, num_labels]."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(repr=False, eq=False)
class TokenClassifierOutput(ModelOutput):
    """Output of `Gemma2ForTokenClassification`: logits [B, S, num_labels]."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(repr=False, eq=False)
class GenerateOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)`; T new tokens, R texts a prompt.

    sequences: int64 [B * R, prompt + T], what `generate` gives otherwise.
    sequences_scores: float32 [B * R], of beam search: log-probability / length ** length_penalty.
    scores: with output_scores, T tensors float32 [N, V], what each token was chosen from: logits
        after all processors and filters, -inf where dropped; of beam search, log-probabilities.
        N is B * R, with beams B * num_beams. 0 for rows that had ended before.
    logits: with output_logits, T tensors float32 [N, V], the model's own.
    beam_indices: of beam search, int64 [B * R, T], the row of `scores` that each token comes from;
        -1 after a text's end.
    past_key_values: the cache, as `generate` leaves it.
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    past_key_values: HybridCache | None = None
