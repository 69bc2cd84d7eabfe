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
    """Prints text as it is generated, character by character, never half of one.

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
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.file = file
        self.skip_special_tokens = skip_special_tokens
        self._start()

    def _start(self) -> None:
        self._prompt_is_next = True
        self._ids: list[int] = []
        self._printed = ""

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
        if skipped:
            return
        self._ids.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self._ids, skip_special_tokens=self.skip_special_tokens)
        # a character whose bytes are not complete yet decodes to the replacement character
        if not text.endswith("\ufffd"):
            self.on_finalized_text(text[len(self._printed) :])
            self._printed = text

    def end(self) -> None:
        """Print what is left, and a line break."""
        text = self.tokenizer.decode(self._ids, skip_special_tokens=self.skip_special_tokens)
        self.on_finalized_text(text[len(self._printed) :], stream_end=True)
        self._start()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text; override it to do something else."""
        print(text, end="\n" if stream_end else "", file=self.file or sys.stdout, flush=True)
