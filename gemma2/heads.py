"""Gemma 2 with a head: next tokens, a label for a sequence, a label for every token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gemma2 import ops
from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.generation import GenerationMixin
from gemma2.model import Gemma2Model, Gemma2PreTrainedModel, Linear, beside
from gemma2.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from gemma2.ring import readable

__all__ = [
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
]

AttentionMask = Tensor | Mapping[str, Tensor | None] | None
IGNORED = -100
# Without gradients the loss looks at so many tokens at a time: the float32 copy of the logits of a
# 256k vocabulary is then 256 MB, not the memory of the whole batch.
_TOKENS_AT_A_TIME = 256


class Gemma2ForCausalLM(GenerationMixin, Gemma2PreTrainedModel):
    """Gemma 2 that predicts the next token; its head shares the embedding's weight if tied."""

    _tied_weights_keys = ("lm_head.weight",)

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.model = Gemma2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            self._init_module(self.lm_head)

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's parameter, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.base_model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gemma2ForCausalLM:
        """Keep a tied weight one parameter in what torch does for `to`, `half`, `to_empty` ..."""
        tied = self.lm_head.weight is self.base_model.embed_tokens.weight
        super()._apply(fn, recurse)
        if tied:
            self.lm_head.weight = self.base_model.embed_tokens.weight
        return self

    def get_output_embeddings(self) -> nn.Module:
        """Give the head."""
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        """Give the arguments of a call; PEFT looks for this method, `generate` does not use it."""
        return {"input_ids": input_ids, **inputs}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Give capped logits [B, kept, V] in the model's dtype, and the loss if labels are given.

        Args:
            labels: int64 [B, S], the tokens themselves: they are shifted here, so that column s
                predicts labels[s + 1]. -100 is ignored.
            logits_to_keep: 0: of all columns; n: of the last n; or the columns' numbers, int64 [n].
                The loss covers what is kept.
            num_items_in_batch: int or tensor: the loss is the sum over the tokens divided by it,
                instead of the mean (gradient accumulation).
            Others: as `Gemma2Model.forward`.

        Raises:
            TypeError, ValueError: the text names the argument.
        """
        num_items = loss_options.pop("num_items_in_batch", None)
        if loss_options:  # not in the signature, since trainers look for ** before they pass it
            raise TypeError(f"Gemma2ForCausalLM.forward: no arguments {sorted(loss_options)}")
        shape = _shape_of(input_ids, inputs_embeds)
        columns = _columns_to_keep(logits_to_keep, shape[1])
        if labels is not None:
            _check_labels(labels, shape, self.config.vocab_size)
        body = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            cu_seqlens,
        )
        logits = self.lm_head(beside(body.last_hidden_state[:, columns], self.lm_head))
        if self.config.final_logit_softcapping is not None:
            logits = ops.softcap(logits, self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device)
            loss = _cross_entropy(logits, following[:, columns], num_items)
        out = CausalLMOutputWithPast(loss, logits, *_rest(body))
        return out if return_dict is not False else out.to_tuple()


class Gemma2ForSequenceClassification(Gemma2PreTrainedModel):
    """Gemma 2 that gives a sequence labels or numbers, read at its last token."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = Gemma2Model(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self._init_module(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Give logits [B, num_labels] at the rightmost token that is not padding.

        Padding is what attention_mask (2-D) hides and, among input_ids, pad_token_id. Of
        inputs_embeds without a mask the last column is read.

        Args:
            labels: by config.problem_type: "single_label_classification": int64 [B];
                "multi_label_classification": floating [B, num_labels]; "regression": floating
                [B] or [B, num_labels]. None: regression if num_labels is 1, single label for
                integers, else multi label.
            Others: as `Gemma2Model.forward`.

        Raises:
            TypeError, ValueError: the text names the argument; also where a batch of several rows
                meets a config without pad_token_id.
        """
        batch, columns = _shape_of(input_ids, inputs_embeds)
        if self.config.pad_token_id is None and batch > 1:
            raise ValueError(
                f"input_ids: a batch of {batch} rows needs config.pad_token_id, to find the last "
                "token of each: it is None"
            )
        problem = None if labels is None else self._problem(labels, batch)
        body = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            cu_seqlens,
        )
        states = beside(body.last_hidden_state, self.score)
        last = self._last_token(input_ids, attention_mask, columns, states)
        rows = torch.arange(batch, device=states.device)
        logits = self.score(states[rows, last])
        loss = None
        if labels is not None:
            loss = _sequence_loss(logits, labels.to(logits.device), problem)
        out = SequenceClassifierOutputWithPast(loss, logits, *_rest(body))
        return out if return_dict is not False else out.to_tuple()

    def _last_token(
        self, input_ids: Tensor | None, mask: AttentionMask, columns: int, states: Tensor
    ) -> Tensor:
        """Give the column of each row's last token, int64 [B]; 0 where all is padding."""
        real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real &= mask[:, mask.shape[1] - columns :].to(states.device) != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            real &= input_ids.to(states.device) != self.config.pad_token_id
        if input_ids is None and not isinstance(mask, Tensor):
            warnings.warn(
                f"{type(self).__name__}: inputs_embeds without a 2-D attention_mask: the last "
                "column is read, and padding there would not be noticed",
                stacklevel=2,
            )
        column = torch.arange(columns, device=states.device)
        return (real * column).argmax(dim=1)

    def _problem(self, labels: Tensor, batch: int) -> str:
        """Give the problem type, with the labels checked against it."""
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        problem = self.config.problem_type
        if problem is None:
            if self.num_labels == 1:
                problem = "regression"
            else:
                problem = "single_label" if whole else "multi_label"
                problem += "_classification"
        shape = tuple(labels.shape)
        if problem == "single_label_classification":
            good = whole and shape in ((batch,), (batch, 1))
            if good and readable(labels):
                good = bool(
                    (((labels >= 0) & (labels < self.num_labels)) | (labels == IGNORED)).all()
                )
        elif problem == "multi_label_classification":
            good = not whole and shape == (batch, self.num_labels)
        else:
            good = shape == (batch, self.num_labels) or (self.num_labels == 1 and shape == (batch,))
        if not good:
            wanted = f"floating [{batch}, {self.num_labels}]"
            if problem == "single_label_classification":
                wanted = f"int64 [{batch}], from 0 to {self.num_labels - 1} or {IGNORED}"
            raise ValueError(
                f"labels: is {labels.dtype} {list(shape)} for {problem}: it must be {wanted}"
            )
        return problem


class Gemma2ForTokenClassification(Gemma2PreTrainedModel):
    """Gemma 2 that gives every token a label."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = Gemma2Model(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = Linear(config.hidden_size, config.num_labels, bias=True)
        self._init_module(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Give logits [B, S, num_labels], and the float32 cross entropy if labels are given.

        Args:
            labels: int64 [B, S]; -100 is ignored.
            Others: as `Gemma2Model.forward`.

        Raises:
            TypeError, ValueError: the text names the argument.
        """
        if labels is not None:
            _check_labels(labels, _shape_of(input_ids, inputs_embeds), self.num_labels)
        body = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
            cu_seqlens,
        )
        logits = self.score(self.dropout(beside(body.last_hidden_state, self.score)))
        loss = None if labels is None else _cross_entropy(logits, labels.to(logits.device))
        out = TokenClassifierOutput(loss, logits, body.hidden_states, body.attentions)
        return out if return_dict is not False else out.to_tuple()


# ---- losses and checks ---------------------------------------------------------------------------


def _cross_entropy(
    logits: Tensor, labels: Tensor, num_items: int | float | Tensor | None = None
) -> Tensor:
    """Give the float32 cross entropy of logits [B, S, V] and labels [B, S], -100 ignored.

    The sum over the tokens divided by `num_items`, None: by their number (NaN if there is none).
    """
    logits, labels = logits.flatten(0, 1), labels.flatten()
    at_a_time = logits.shape[0] if torch.is_grad_enabled() else _TOKENS_AT_A_TIME
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for first in range(0, logits.shape[0], max(at_a_time, 1)):
        part = slice(first, first + at_a_time)
        total = total + F.cross_entropy(
            logits[part].float(), labels[part], ignore_index=IGNORED, reduction="sum"
        )
    if num_items is None:
        return total / (labels != IGNORED).sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _sequence_loss(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    logits = logits.float()
    if problem == "regression":
        return F.mse_loss(logits.flatten(), labels.flatten().float())
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long(), ignore_index=IGNORED)
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def _rest(body: BaseModelOutputWithPast) -> tuple[Any, Any, Any]:
    return body.past_key_values, body.hidden_states, body.attentions


def _shape_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """Give B and S; of malformed input anything, since the body is going to refuse it."""
    x = input_ids if input_ids is not None else inputs_embeds
    if isinstance(x, Tensor) and x.dim() >= 2:
        return x.shape[0], x.shape[1]
    return 1, 1


def _check_labels(labels: Tensor, shape: tuple[int, int], classes: int) -> None:
    if labels.dtype != torch.int64 or tuple(labels.shape) != shape:
        raise ValueError(
            f"labels: is {labels.dtype} {list(labels.shape)}: it must be int64 {list(shape)}"
        )
    if readable(labels):
        bad = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
        if bool(bad.any()):
            raise ValueError(
                f"labels: holds {int(labels[bad][0])}: it must be from 0 to {classes - 1}, or "
                f"{IGNORED} for what is ignored"
            )


def _columns_to_keep(logits_to_keep: int | Tensor, columns: int) -> slice | Tensor:
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype != torch.int64 or logits_to_keep.dim() != 1:
            raise ValueError(
                f"logits_to_keep: is {logits_to_keep.dtype} {list(logits_to_keep.shape)}: it must "
                "be an int or int64 [n]"
            )
        if readable(logits_to_keep):
            bad = (logits_to_keep >= columns) | (logits_to_keep < -columns)
            if bool(bad.any()):
                raise ValueError(
                    f"logits_to_keep: holds {int(logits_to_keep[bad][0])}: there are {columns} "
                    "columns"
                )
        return logits_to_keep
    if not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool):
        raise TypeError(
            f"logits_to_keep: is a {type(logits_to_keep).__name__}: it must be an int or a tensor"
        )
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep: is {logits_to_keep}: it must not be negative")
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)
