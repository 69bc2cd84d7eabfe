"""Receivers of tokens as they are generated."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO, runtime_checkable

import torch

__all__ = ["Streamer", "TextStreamer"]


@runtime_checkable
class Streamer(Protocol):
    """What `generate(streamer=)` takes, the protocol of transformers.

    `put` is called with the prompt, int64 [B, S], then after each step with the new tokens,
    int64 [B]; `end` once after the last step, also when generation is cut short by an exception.
    Tensors come on the CPU.
    """

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class TextStreamer:
    """Prints text as it is generated, only whole characters, each as soon as it is known.

    Args:
        tokenizer: a :class:`gemma2.Tokenizer`, or one of transformers.
        skip_prompt: do not print the prompt.
        file: where to write; standard output if None.
        skip_special_tokens: leave out `<eos>` and the like.

    Raises:
        ValueError: from `put`, when the batch has more than one row.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        file: TextIO | None = None,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self.skip_prompt = skip_prompt
        self.file = file
        if hasattr(tokenizer, "decode_stream"):
            self._decoder: _Decoder = tokenizer.decode_stream(skip_special_tokens)
        else:
            self._decoder = _GrowingText(tokenizer, skip_special_tokens)
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, S] or the next token [1]."""
        rows = value.shape[0] if value.dim() else 1
        if rows != 1:
            raise ValueError(
                f"TextStreamer: the batch has {rows} rows: only one text can be printed at a time; "
                "use model.stream(...) for batches"
            )
        skipped = self._prompt_is_next and self.skip_prompt
        self._prompt_is_next = False
        if not skipped:
            text = "".join(self._decoder.put(token) for token in value.flatten().tolist())
            if text:
                self.on_finalized_text(text)

    def end(self) -> None:
        """Print what is left, and a line break; then be ready for another prompt."""
        self.on_finalized_text(self._decoder.end(), stream_end=True)
        self._prompt_is_next = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text; override it to do something else."""
        print(text, end="\n" if stream_end else "", file=self.file or sys.stdout, flush=True)


class _Decoder(Protocol):
    def put(self, token: int) -> str: ...

    def end(self) -> str: ...


class _GrowingText:
    """Text of a tokenizer that cannot decode incrementally: a line is decoded again and again."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = 0  # characters of their text

    def put(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        # a letter whose bytes are not all there yet decodes to the replacement character
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[self._given :]
        self._given = len(text)
        if text.endswith("\n"):
            self._ids, self._given = [], 0
        return new

    def end(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        new = text[self._given :]
        self._ids, self._given = [], 0
        return new
