"""The prompts of a call of `generate`: tokens or embeddings, and where their padding is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.generation.config import GenerationConfig

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["Prompts"]


@dataclass
class Prompts:
    """B prompts, each of which is gone on with in `repeats` rows: N = B repeats.

    content: int64 [B, S], or embeddings [B, S, hidden_size].
    mask: bool [B, S], True = token; None: all are.
    lengths, counts: tokens of each prompt, int64 [B] on the device, and on the host.
    """

    content: Tensor
    mask: Tensor | None
    lengths: Tensor
    counts: list[int]
    repeats: int

    @classmethod
    def of(
        cls,
        model: GenerationMixin,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        options: GenerationConfig,
        device: torch.device,
    ) -> Prompts:
        """Check what `generate` was given.

        Raises:
            TypeError, ValueError: it cannot be continued; the text says why.
        """
        content = _content(model, input_ids, inputs_embeds, options, device)
        mask = _padding_mask(content, attention_mask, options)
        if content.dim() == 2:
            _check_vocabulary(content, mask, model.config.vocab_size)
        batch, columns = content.shape[:2]
        lengths = torch.full((batch,), columns, device=device) if mask is None else mask.sum(1)
        counts = lengths.tolist()
        if 0 in counts:
            raise ValueError(
                f"generate: row {counts.index(0)} has no token, only padding: there is nothing to "
                "go on from"
            )
        beams, texts = options.num_beams, options.num_return_sequences
        return cls(content, mask, lengths, counts, beams if beams > 1 else texts)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.counts) * self.repeats

    @property
    def are_tokens(self) -> bool:
        """Whether they are tokens, not embeddings."""
        return self.content.dim() == 2

    def shown(self) -> Tensor:
        """Give what stands before the new tokens, int64 [N, S]; S is 0 for embeddings."""
        if self.are_tokens:
            return self.content.repeat_interleave(self.repeats, dim=0)
        return self.content.new_empty((self.rows, 0), dtype=torch.int64)

    def tokens(self) -> list[list[int]]:
        """Give the tokens of each prompt without padding, on the host."""
        mask = torch.ones_like(self.content, dtype=torch.bool) if self.mask is None else self.mask
        both = zip(self.content.cpu(), mask.cpu(), strict=True)
        return [row[real].tolist() for row, real in both]

    def last(self) -> list[int | None]:
        """Give the last token of each row, N of them on the host; None where it is an embedding."""
        last: list[int | None] = [None] * len(self.counts)
        if self.are_tokens:
            column = self._tokens_first().gather(1, self.lengths[:, None] - 1)
            last = self.content.gather(1, column)[:, 0].tolist()
        return [token for token in last for _ in range(self.repeats)]

    def starts(self) -> Tensor:
        """Give where new tokens begin in `text`, int64 [N]."""
        tokens = self.lengths if self.are_tokens else torch.zeros_like(self.lengths)
        return tokens.repeat_interleave(self.repeats)

    def pack(self, cached: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the tokens after the first `cached` of each row, padded at the left, and their mask.

        So the last column is each row's last token, and padding costs no more than the longest row
        has.

        Args:
            cached: int64 [B], how many tokens of each row to leave out.

        Returns:
            [B, P] or [B, P, hidden_size], and bool [B, P], None if all are tokens.
        """
        content, lengths = self.content, self.lengths
        width = int((lengths - cached).max())
        order = self._tokens_first()
        # number of the token among the row's real ones, [B, P]; padding repeats the row's first
        number = lengths[:, None] - width + torch.arange(width, device=content.device)
        kept = number >= cached[:, None]
        column = order.gather(1, number.clamp(min=0))
        rows = torch.arange(content.shape[0], device=content.device)[:, None]
        return content[rows, column], None if bool(kept.all()) else kept

    def text(self, columns: int) -> Tensor:
        """Give the tokens of each row from column 0 on, int64 [N, columns]; -1 where none is yet."""
        text = self.content.new_full((len(self.counts), columns), -1, dtype=torch.int64)
        if self.are_tokens:
            known = self.content
            if self.mask is not None:
                known = known.masked_fill(~self.mask, -1).gather(1, self._tokens_first())
            known = known[:, :columns]
            text[:, : known.shape[1]] = known
        return text.repeat_interleave(self.repeats, dim=0)

    def _tokens_first(self) -> Tensor:
        """Give the columns of each row, int64 [B, S], those of real tokens first."""
        if self.mask is None:
            columns = torch.arange(self.content.shape[1], device=self.content.device)
            return columns.expand(self.content.shape[:2])
        return torch.argsort((~self.mask).to(torch.uint8), dim=1, stable=True)


def _content(
    model: GenerationMixin,
    input_ids: Tensor | None,
    embeds: Tensor | None,
    options: GenerationConfig,
    device: torch.device,
) -> Tensor:
    """Give what is to be continued: int64 [B, S], or [B, S, hidden_size]."""
    if input_ids is not None and embeds is not None:
        raise ValueError("generate: input_ids and inputs_embeds are both given: pass one")
    if input_ids is not None:
        return _check_ids(input_ids)
    if embeds is None:
        if options.bos_token_id is None:
            raise ValueError(
                "generate: neither input_ids nor inputs_embeds is given, and there is no "
                "bos_token_id to begin with"
            )
        return torch.tensor([[options.bos_token_id]], device=device)
    hidden = model.config.hidden_size
    if embeds.dim() != 3 or embeds.shape[2] != hidden or 0 in embeds.shape:
        raise ValueError(
            f"generate: inputs_embeds has shape {list(embeds.shape)}: it must be [rows, "
            f"tokens, {hidden}], with at least one row and one token"
        )
    if not embeds.is_floating_point():
        raise TypeError(f"generate: inputs_embeds is {embeds.dtype}: it must be floating")
    return embeds


def _check_ids(ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"generate: input_ids is {ids.dtype}: it must be int64")
    if ids.dim() != 2:
        hint = "; input_ids[None] makes one row of it" if ids.dim() == 1 else ""
        raise ValueError(
            f"generate: input_ids has shape {list(ids.shape)}: it must be [rows, tokens]{hint}"
        )
    if 0 in ids.shape:
        raise ValueError(
            f"generate: input_ids has shape {list(ids.shape)}: at least one row and one token are "
            "wanted; a text begins with bos_token_id"
        )
    return ids.to(torch.int64)


def _check_vocabulary(ids: Tensor, mask: Tensor | None, vocab: int) -> None:
    bad = (ids < 0) | (ids >= vocab)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"generate: input_ids[{row}, {column}] is {int(ids[row, column])}: the vocabulary has "
            f"{vocab} tokens"
        )


def _padding_mask(
    content: Tensor, attention_mask: Tensor | None, options: GenerationConfig
) -> Tensor | None:
    """Give bool [B, S], True = token; None if all are.

    Like transformers, takes pads in the prompt as padding unless pad also ends texts.
    """
    batch, columns = content.shape[:2]
    if attention_mask is None:
        pad = options.pad_token_id
        if content.dim() != 2 or pad is None or pad in options.eos_token_ids:
            return None
        mask = content != pad
        if bool(mask.all()):
            return None
        warnings.warn(
            f"generate: input_ids contains pad_token_id ({pad}) and no attention_mask is given: "
            "these tokens are taken as padding; pass attention_mask to say what is meant",
            stacklevel=5,
        )
        return mask
    if attention_mask.shape != (batch, columns):
        raise ValueError(
            f"generate: attention_mask has shape {list(attention_mask.shape)}: it must be "
            f"[{batch}, {columns}] like the prompt, with 1 for a token and 0 for padding"
        )
    if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            "generate: attention_mask has other values than 1 for a token and 0 for padding"
        )
    mask = attention_mask != 0
    return None if bool(mask.all()) else mask
