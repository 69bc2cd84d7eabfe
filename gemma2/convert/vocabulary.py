"""A SentencePiece BPE vocabulary: from ``tokenizer.model`` or ``tokenizer.json``, and into the latter.

Gemma's tokenizer is byte-pair encoding as SentencePiece does it: neighbours are joined for as long
as their joint text is a piece, the best score first, the leftmost of equals first. The library
`tokenizers` has a ranked list of pairs instead. Both say the same if every split of a piece into
two pieces is in the list, at the place of the piece's score. What cannot be said faithfully is
refused with `UnfaithfulError`, because a tokenizer that is nearly right spoils a model without a word.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"  # how a vocabulary writes a space

_MAX_MODEL_BYTES = 256 * 2**20
_TURNS = ("<start_of_turn>", "<end_of_turn>")
_BYTE_NAMES = [f"<0x{value:02X}>" for value in range(256)]


class UnfaithfulError(ValueError):
    """A tokenizer that the other form cannot express; the text says why."""


@dataclass
class Vocabulary:
    """The pieces of a tokenizer by id: texts (spaces written as SPACE), scores, types."""

    pieces: list[str]
    scores: np.ndarray
    types: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.pieces) == len(self.scores) == len(self.types):
            raise UnfaithfulError(
                f"it has {len(self.pieces)} pieces, {len(self.scores)} scores and "
                f"{len(self.types)} types"
            )
        if len(set(self.pieces)) != len(self.pieces) or "" in self.pieces:
            raise UnfaithfulError("a piece is empty or there twice")
        self.scores = np.asarray(self.scores, np.float32)
        self.types = np.asarray(self.types, np.int32)

    def of_type(self, *types: int) -> list[str]:
        return [self.pieces[i] for i in np.flatnonzero(np.isin(self.types, types))]

    def padded(self, size: int) -> Vocabulary:
        """Give it with unused pieces up to `size`, which is the model's number of embeddings."""
        lacking = size - len(self.pieces)
        if lacking < 0:
            raise UnfaithfulError(f"it has {len(self.pieces)} pieces, the model {size} embeddings")
        unused = [f"[PAD{i}]" for i in range(len(self.pieces), size)]
        return Vocabulary(
            self.pieces + unused,
            np.append(self.scores, np.full(lacking, -10000.0, np.float32)),
            np.append(self.types, np.full(lacking, UNUSED, np.int32)),
        )

    def marked(self, config: Mapping[str, Any], added: Iterable[str] = ()) -> Vocabulary:
        """Give it with the special tokens of a ``tokenizer_config.json`` as control pieces.

        Raises:
            UnfaithfulError: a token of the settings, or one of `added`, is no piece.
        """
        listed = config.get("added_tokens_decoder")
        special, named = set(_TURNS), list(added)
        for entry in listed.values() if isinstance(listed, Mapping) else ():
            if isinstance(entry, Mapping):
                named.append(str(entry.get("content")))
                if entry.get("special") is True:
                    special.add(named[-1])
        pieces = set(self.pieces)
        for name in named:
            # transformers calls the byte of a tabulator by itself
            if name.replace(" ", SPACE) not in pieces and name != "\t":
                raise UnfaithfulError(f"it lacks {name[:100]!r}, which its settings have")
        types = self.types.copy()
        for i in np.flatnonzero(types == USER_DEFINED):
            if self.pieces[i] in special:
                types[i] = CONTROL
        return dataclasses.replace(self, types=types)


# ---- tokenizer.model -----------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Give the fields of one protobuf message: number and value, fixed ones as their bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                break
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise UnfaithfulError("it is damaged")

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise UnfaithfulError("it is damaged")
        length = varint() if wire == 2 else 8 if wire == 1 else 4
        if length > len(data) - at:
            raise UnfaithfulError("it is damaged")
        yield tag >> 3, data[at : at + length]
        at += length


def _message(value: int | bytes) -> dict[int, int | bytes]:
    if not isinstance(value, bytes):
        raise UnfaithfulError("it is damaged")
    return dict(_fields(value))


def from_model(path: Path) -> Vocabulary:
    """Read a ``tokenizer.model`` of SentencePiece.

    Only this small part of the format is needed, and the library does not tell which pieces are
    user-defined. Numbers of fields: sentencepiece_model.proto.

    Raises:
        UnfaithfulError: it is damaged, no BPE model, or changes the text before it is split.
    """
    if path.stat().st_size > _MAX_MODEL_BYTES:
        raise UnfaithfulError(f"it has more than {_MAX_MODEL_BYTES} bytes")
    pieces, scores, types = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(path.read_bytes()):
        if number == 1:
            piece = _message(value)
            text, score, kind = piece.get(1, b""), piece.get(2, bytes(4)), piece.get(3, NORMAL)
            if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
                raise UnfaithfulError("it is damaged")
            try:
                pieces.append(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UnfaithfulError("it is damaged") from error
            scores.append(struct.unpack("<f", score)[0])
            types.append(kind if kind in range(NORMAL, BYTE + 1) else UNUSED)
        elif number == 2:
            trainer = _message(value)
        elif number == 3:
            normalizer = _message(value)
    if trainer.get(3, 1) != 2:
        raise UnfaithfulError("it is no BPE model")
    if trainer.get(24, 0):
        raise UnfaithfulError("it puts spaces after words")
    if normalizer.get(2, b"") or not normalizer.get(5, 1):
        raise UnfaithfulError("it rewrites characters before it splits a text")
    if normalizer.get(3, 1):
        raise UnfaithfulError("it adds a space before a text")
    if normalizer.get(4, 1):
        raise UnfaithfulError("it drops spaces")
    return Vocabulary(pieces, np.array(scores, np.float32), np.array(types, np.int32))


# ---- tokenizer.json ------------------------------------------------------------------------------

_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SPLITS = (
    None,
    # has no effect: after the normaliser there is no space left
    {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
)


# Of the BPE of `tokenizers`, what changes how pieces are joined.
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


def from_json(path: Path) -> Vocabulary:
    """Read a ``tokenizer.json``.

    Raises:
        UnfaithfulError: it is damaged, or not what SentencePiece's BPE can do.
    """
    if path.stat().st_size > _MAX_MODEL_BYTES:
        raise UnfaithfulError(f"it has more than {_MAX_MODEL_BYTES} bytes")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnfaithfulError("it is damaged") from error
    if not isinstance(content, dict):
        raise UnfaithfulError("it is damaged")
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UnfaithfulError("it is no BPE model")
    if content.get("normalizer") != _TO_SPACE or content.get("pre_tokenizer") not in _SPLITS:
        raise UnfaithfulError("it rewrites or splits a text before pieces are joined")
    if model.get("byte_fallback") is not True:
        raise UnfaithfulError("it has no bytes for unknown characters")
    for option in _OPTIONS:
        if model.get(option):
            raise UnfaithfulError(f"it has the option {option}")
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise UnfaithfulError("it is damaged")
    ids = dict(ids)
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise UnfaithfulError("it is damaged")
        if any(entry.get(option) for option in ("lstrip", "rstrip", "single_word")):
            raise UnfaithfulError(
                f"it takes what is around {entry['content'][:100]!r} into account"
            )
        ids[entry["content"]] = entry.get("id")
    pieces: list[str] = [""] * len(ids)
    for text, number in ids.items():
        if not isinstance(number, int) or not 0 <= number < len(pieces) or pieces[number]:
            raise UnfaithfulError("its ids are not the numbers from 0 on")
        pieces[number] = text.replace(" ", SPACE)
    if "\t" in ids and _BYTE_NAMES[9] not in ids:  # transformers calls the byte so
        pieces[ids["\t"]] = _BYTE_NAMES[9]
        ids[_BYTE_NAMES[9]] = ids.pop("\t")
    types = np.full(len(pieces), NORMAL, np.int32)
    types[[ids[name] for name in _BYTE_NAMES if name in ids]] = BYTE
    for entry in added:
        if entry["content"] in ids:
            types[ids[entry["content"]]] = CONTROL if entry.get("special") else USER_DEFINED
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in ids:
        types[ids[unknown]] = UNKNOWN
    scores = _scores(pieces, types, merges)
    return Vocabulary(pieces, scores, types)


def _scores(pieces: list[str], types: np.ndarray, merges: list[Any]) -> np.ndarray:
    """Give the scores at which SentencePiece joins pieces in the order of `merges`."""
    normal = {piece for piece, kind in zip(pieces, types.tolist(), strict=True) if kind == NORMAL}
    spans: dict[str, tuple[int, int, int]] = {}  # piece -> first place, last place, how many
    for rank, pair in enumerate(merges):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
            raise UnfaithfulError("it is damaged")
        joined = parts[0] + parts[1]
        if joined in normal and parts[0] in normal and parts[1] in normal:
            first, _, count = spans.get(joined, (rank, rank, 0))
            spans[joined] = (first, rank, count + 1)
    ordered = sorted(spans, key=lambda piece: spans[piece][0])
    for piece, following in itertools.pairwise(ordered):
        if spans[piece][1] >= spans[following][0]:
            raise UnfaithfulError(f"it joins {following!r} now before, now after {piece!r}")
    for piece in normal:
        splits = sum(1 for _ in _splits(piece, normal))
        if splits != spans.get(piece, (0, 0, 0))[2]:
            raise UnfaithfulError(f"it joins {piece!r} from some of its parts only")
    places = {piece: -float(place) for place, piece in enumerate(ordered)}
    return np.array([places.get(piece, 0.0) for piece in pieces], np.float32)


def _splits(piece: str, pieces: set[str]) -> Iterator[tuple[str, str]]:
    for i in range(1, len(piece)):
        if piece[:i] in pieces and piece[i:] in pieces:
            yield piece[:i], piece[i:]


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Give the pairs that `tokenizers` joins, the best first, as SentencePiece joins them."""
    rows = np.flatnonzero(vocabulary.types == NORMAL)
    normal = {vocabulary.pieces[i] for i in rows}
    joined: list[tuple[float, list[tuple[str, str]]]] = []
    for i in rows:
        piece = vocabulary.pieces[i]
        pairs = list(_splits(piece, normal))[::-1]  # in the order of transformers
        if pairs:
            joined.append((float(vocabulary.scores[i]), pairs))
    scores = [score for score, _ in joined]
    if not np.isfinite(scores).all() or len(set(scores)) != len(scores):
        raise UnfaithfulError("several pieces have the same score")
    joined.sort(key=lambda item: -item[0])
    return [pair for _, pairs in joined for pair in pairs]


def to_tokenizer(vocabulary: Vocabulary, bos: str | None) -> Any:
    """Give the `tokenizers.Tokenizer` that encodes as SentencePiece does with this vocabulary.

    `bos`: the piece that its post-processor puts before a text, None for none.

    Raises:
        UnfaithfulError: the vocabulary has scores that do not order it, or not all bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    if set(vocabulary.of_type(BYTE)) != set(_BYTE_NAMES):
        raise UnfaithfulError("it has not all 256 bytes")
    unknown = vocabulary.of_type(UNKNOWN)
    if len(unknown) != 1:
        raise UnfaithfulError(f"it has {len(unknown)} pieces for what is unknown")
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            ids, _merges(vocabulary), unk_token=unknown[0], fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
        )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece in vocabulary.of_type(CONTROL, UNKNOWN)]
    )
    # User-defined pieces are found in the text with its spaces rewritten, as SentencePiece does.
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=True) for piece in vocabulary.of_type(USER_DEFINED)]
    )
    return tokenizer
