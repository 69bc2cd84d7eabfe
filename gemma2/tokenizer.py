"""Text to token ids and back: ``tokenizer.json`` or ``tokenizer.model``, in the hub's layout.

The begin-of-sequence token is part of Gemma 2's input: a prompt without it gives bad text and ruins
scores, one with two of them gives worse text. So it is added by default, and never twice: not when
the text already begins with it, and not by the file's own post-processor, which is not run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma2.config import read_json, show

__all__ = ["DecodeStream", "Tokenizer"]

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"

_NAMES = {"bos": ("<bos>", "<s>"), "eos": ("<eos>", "</s>"), "pad": ("<pad>",)}
_TURN, _END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = 8  # tokens; a character has at most four bytes


class _Backend(Protocol):
    """What the two libraries have in common; none adds a token of its own here."""

    file: str

    def size(self) -> int: ...
    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def token(self, number: int) -> str | None: ...
    def number(self, token: str) -> int | None: ...
    def special(self) -> list[str]: ...
    def save(self, path: Path) -> None: ...


def _unreadable(path: Path, error: BaseException) -> ValueError:
    said = str(error)
    if len(said) > 1000:  # it may repeat what is in the file
        said = f"{said[:1000]}... ({len(said)} characters)"
    return ValueError(f"{path}: not a readable tokenizer: {said}")


class _TokenizersBackend:
    file = TOKENIZER_JSON

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(path))
        except BaseException as error:
            # The library raises Exception itself, and where it panics what is not even that.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise _unreadable(path, error) from error
        # A file may ask for these; then a long prompt would lose its end without a word.
        self._library.no_truncation()
        self._library.no_padding()

    def size(self) -> int:
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [list(item.ids) for item in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, number: int) -> str | None:
        token = self._library.id_to_token(number)
        return None if token is None else str(token)

    def number(self, token: str) -> int | None:
        number = self._library.token_to_id(token)
        return None if number is None else int(number)

    def special(self) -> list[str]:
        added = self._library.get_added_tokens_decoder().values()
        return [str(token.content) for token in added if token.special]

    def save(self, path: Path) -> None:
        self._library.save(str(path))


class _SentencePieceBackend:
    file = TOKENIZER_MODEL

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("sentencepiece") is None:
            raise ImportError(
                f"{path}: reading it needs sentencepiece: pip install 'gemma2[sentencepiece]', or "
                f"put a {TOKENIZER_JSON} beside it"
            )
        from sentencepiece import SentencePieceProcessor

        try:
            self._library = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise _unreadable(path, error) from error
        # sentencepiece itself takes control tokens in a text for plain letters
        self._control = {
            self._library.id_to_piece(i): i
            for i in range(self.size())
            if self._library.is_control(i)
        }
        names = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})") if names else None

    def size(self) -> int:
        return int(self._library.get_piece_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += self._library.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            return str(self._library.decode([i for i in ids if not self._library.is_control(i)]))
        text = ""
        run: list[int] = []
        for i in ids:
            if self._library.is_control(i):
                text += str(self._library.decode(run)) + str(self._library.id_to_piece(i))
                run = []
            else:
                run.append(i)
        return text + str(self._library.decode(run))

    def token(self, number: int) -> str | None:
        return str(self._library.id_to_piece(number)) if 0 <= number < self.size() else None

    def number(self, token: str) -> int | None:
        number = int(self._library.piece_to_id(token))
        # an unknown piece gives the id of <unk>
        return number if self._library.id_to_piece(number) == token else None

    def special(self) -> list[str]:
        return list(self._control)

    def save(self, path: Path) -> None:
        path.write_bytes(self._library.serialized_model_proto())


class DecodeStream:
    """Text from token ids that come one by one, cut only between whole characters.

    A character may be spread over several tokens (bytes of an emoji); `put` gives "" until it is
    complete. What was given is never taken back. Decoding looks back a few tokens, so a step costs
    the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # tokens of the last piece of text, then the pending ones
        self._given = 0  # how many of them have been given

    def put(self, token: int) -> str:
        """Take one token id; give the text that it completes, "" if none."""
        self._ids.append(int(token))
        before, text = self._texts()
        # Letters that are still coming show as replacement characters at the end. Real ones are
        # held back too, until the next letter, the end, or more tokens than a letter can need.
        if len(text) <= len(before):
            return ""
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._given < _LONGEST_WAIT:
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """Give what is left, with incomplete characters as U+FFFD, and start anew."""
        before, text = self._texts()
        self._ids, self._given = [], 0
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        # The given tokens are decoded again with the pending ones because a token's text depends on
        # what stands before it (a leading space is dropped at the start of a text).
        before = self._tokenizer.decode(self._ids[: self._given], self._skip)
        return before, self._tokenizer.decode(self._ids, self._skip)


class Tokenizer:
    """A Gemma 2 tokenizer. Make one with `from_pretrained`.

    `bos_id`, `eos_id` and `pad_id` are None where the files name no such token, `start_of_turn_id`
    and `end_of_turn_id` where the vocabulary has none.
    """

    def __init__(self, backend: _Backend, special: Mapping[str, Any] | None = None) -> None:
        """`special`: the parsed ``tokenizer_config.json``, which names the special tokens."""
        self._backend = backend
        self._config = dict(special or {})
        self.bos_id = self._find("bos")
        self.eos_id = self._find("eos")
        self.pad_id = self._find("pad")
        self.start_of_turn_id = backend.number(_TURN)
        self.end_of_turn_id = backend.number(_END_OF_TURN)
        found = (
            self.bos_id, self.eos_id, self.pad_id, self.start_of_turn_id, self.end_of_turn_id,
        )  # fmt: skip
        self._structure = {n: str(backend.token(n)) for n in found if n is not None}
        texts = {*backend.special(), *self._structure.values()}
        # a lookahead finds those that begin inside of another one, too
        pattern = "|".join(map(re.escape, sorted(texts)))
        self._begins_special = re.compile(f"(?={pattern})") if pattern else None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read ``tokenizer.json`` in `folder`, or ``tokenizer.model`` where there is none.

        Raises:
            FileNotFoundError: the folder holds neither.
            ImportError: there is only a ``tokenizer.model`` and sentencepiece is not installed.
            ValueError: a file is damaged; the text begins with its path.
        """
        path = Path(folder)
        backend: _Backend
        if (path / TOKENIZER_JSON).is_file():
            backend = _TokenizersBackend(path / TOKENIZER_JSON)
        elif (path / TOKENIZER_MODEL).is_file():
            backend = _SentencePieceBackend(path / TOKENIZER_MODEL)
        else:
            raise FileNotFoundError(f"{path}: holds neither {TOKENIZER_JSON} nor {TOKENIZER_MODEL}")
        config = path / TOKENIZER_CONFIG
        special = read_json(config) if config.is_file() else None
        try:
            return cls(backend, special)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer and ``tokenizer_config.json`` into `folder`, made if absent."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._backend.save(path / self._backend.file)
        config = dict(self._config)
        for kind in _NAMES:
            number = getattr(self, f"{kind}_id")
            if number is not None:
                config.setdefault(f"{kind}_token", self._backend.token(number))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (path / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")

    def _find(self, kind: str) -> int | None:
        named = self._config.get(f"{kind}_token")
        if isinstance(named, Mapping):  # older files describe the token with its stripping rules
            named = named.get("content")
        if named is not None:
            if not isinstance(named, str):
                raise ValueError(
                    f"{TOKENIZER_CONFIG}: {kind}_token is {show(named)}: it must be the token's text"
                )
            number = self._backend.number(named)
            if number is None:
                raise ValueError(
                    f"{TOKENIZER_CONFIG}: {kind}_token is {show(named)}, which {self._backend.file} "
                    "does not know"
                )
            return number
        found = (self._backend.number(name) for name in _NAMES[kind])
        return next((number for number in found if number is not None), None)

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self._backend.file}, vocab_size={self.vocab_size}, bos_id={self.bos_id}, "
            f"eos_id={self.eos_id}, pad_id={self.pad_id})"
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self._backend.size()

    def token_to_id(self, token: str) -> int | None:
        """Give the id of the token that is written `token`, None if there is none."""
        return self._backend.number(token)

    def id_to_token(self, number: int) -> str | None:
        """Give how the token `number` is written in the vocabulary, None if there is none."""
        return self._backend.token(number)

    def encode(self, text: str, add_bos: bool = True, allow_special: bool = True) -> list[int]:
        """Give the token ids of `text`.

        Args:
            add_bos: begin with one begin-of-sequence token.
            allow_special: special tokens that are written out in the text count as such. False:
                they are letters like all others, so that text from elsewhere can end no turn.

        Raises:
            ValueError: without special tokens, but the vocabulary has no letters for one.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: text is {type(text).__name__}: it must be a string")
        if allow_special:
            return self._encode([text], add_bos)[0]
        ids = self._encode_letters(text)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def _encode_letters(self, text: str) -> list[int]:
        """Give the ids of `text` as letters, without a special token among them."""
        if self._begins_special is None:
            return self._encode([text], add_bos=False)[0]
        # Cut after its first letter, a special token is none any more, in either library.
        cuts = [match.start() + 1 for match in self._begins_special.finditer(text)]
        edges = zip([0, *cuts], [*cuts, len(text)], strict=True)
        rows = self._encode([text[first:end] for first, end in edges], add_bos=False)
        ids = [number for row in rows for number in row]
        present = set(ids)
        for number, name in self._structure.items():
            if number in present:
                raise ValueError(
                    f"encode: the text comes out with the special token {name}: the vocabulary "
                    "has no other way to write it; leave it out"
                )
        return ids

    def _encode(self, texts: Sequence[str], add_bos: bool) -> list[list[int]]:
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"encode: {show(text)} has half of a pair of surrogates, which is no character"
                ) from error
        rows = self._backend.encode(texts)
        if add_bos and self.bos_id is not None:
            rows = [row if row[:1] == [self.bos_id] else [self.bos_id, *row] for row in rows]
        return rows

    def __call__(
        self, texts: str | Sequence[str], padding_side: str = "left", add_bos: bool = True
    ) -> dict[str, Tensor]:
        """Give {"input_ids", "attention_mask"}, both int64 [B, S], S the longest row.

        `attention_mask` is 1 on tokens and 0 on padding, which stands on `padding_side`: "left" for
        generation, "right" as transformers trains. One string is a batch of one.

        Raises:
            ValueError: another padding_side; rows of unequal length and no padding token.
            TypeError: something else than strings.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(rows):
            if not isinstance(text, str):
                raise TypeError(
                    f"tokenizer: texts[{i}] is {type(text).__name__}: it must be a string"
                )
        if padding_side not in ("left", "right"):
            raise ValueError(
                f'tokenizer: padding_side is {padding_side!r}: it must be "left" or "right"'
            )
        encoded = self._encode(rows, add_bos)
        longest = max(map(len, encoded), default=0)
        pad = self.pad_id
        if pad is None:
            if any(len(row) != longest for row in encoded):
                raise ValueError(
                    "tokenizer: the texts differ in length and there is no padding token: name one "
                    f"as pad_token in {TOKENIZER_CONFIG}"
                )
            pad = 0  # never used
        ids = torch.full((len(encoded), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(encoded):
            columns = (
                slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
            )
            ids[i, columns] = torch.tensor(row, dtype=torch.int64)
            mask[i, columns] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def encode_chat(
        self, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Give the ids of a conversation in the form that the instruction-tuned models know.

        `messages` are {"role", "content"} with the roles "user" and "assistant" (or "model") in
        turn, the user first. `add_generation_prompt`: end with the head of the model's turn. The
        result has one begin-of-sequence token: give it to the model as it is. Special tokens that
        are written out in a message are letters there: a message cannot leave its turn.
        Format: the chat template of google/gemma-2-2b-it.

        Raises:
            ValueError: a system message, roles out of turn, or a vocabulary without turns.
        """
        head, end = self.start_of_turn_id, self.end_of_turn_id
        if head is None or end is None:
            lacking = _TURN if head is None else _END_OF_TURN
            raise ValueError(f"encode_chat: the vocabulary has no {lacking}: it knows no turns")
        ids = [] if self.bos_id is None else [self.bos_id]
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role == "system":
                raise ValueError(
                    "encode_chat: Gemma 2 has no system role: put the text at the beginning of the "
                    "first user message, followed by an empty line"
                )
            wanted = "assistant" if i % 2 else "user"
            if role != wanted and not (role == "model" and wanted == "assistant"):
                raise ValueError(
                    f"encode_chat: messages[{i}] has the role {role!r}: it must be {wanted!r}, "
                    "since user and assistant take turns"
                )
            if not isinstance(content, str):
                raise TypeError(
                    f"encode_chat: messages[{i}] has the content {content!r}: it must be a string"
                )
            name = "model" if wanted == "assistant" else "user"
            ids += [head, *self._encode_letters(f"{name}\n{content.strip()}"), end]
            ids += self._encode_letters("\n")
        if add_generation_prompt:
            ids += [head, *self._encode_letters("model\n")]
        return ids

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Give the text of `ids`, a sequence of integers or an int tensor [S].

        Incomplete characters become U+FFFD.

        Raises:
            ValueError: an id that the vocabulary does not have, or a tensor of another shape.
        """
        if isinstance(ids, Tensor):
            if ids.dim() != 1:
                raise ValueError(
                    f"decode: ids has the shape {list(ids.shape)}: it must be one row [S]"
                )
            ids = ids.tolist()
        numbers = [int(number) for number in ids]
        for number in numbers:
            if number < 0 or self._backend.token(number) is None:
                raise ValueError(
                    f"decode: {number} is no id of this tokenizer, which has {self.vocab_size} "
                    "tokens: does it belong to the model?"
                )
        return self._backend.decode(numbers, skip_special_tokens)

    def batch_decode(
        self, rows: Sequence[Sequence[int]] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """Give the text of each row of `rows`, e.g. int64 [B, S]; raises as `decode`."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Give a decoder for ids that come one by one: `put(id)` and finally `end()` give text."""
        return DecodeStream(self, skip_special_tokens)
