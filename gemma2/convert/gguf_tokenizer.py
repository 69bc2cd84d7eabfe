"""The tokenizer inside a GGUF file, from and to the files of the hub.

llama.cpp calls SentencePiece's BPE "llama". It looks for user-defined pieces in the text before it
rewrites spaces, so that their spaces are stored as such; the rest is the vocabulary as it is.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from gemma2.config import read_json
from gemma2.convert import vocabulary
from gemma2.convert.gguf_file import File
from gemma2.convert.source import Source
from gemma2.convert.vocabulary import SPACE, UnfaithfulError, Vocabulary
from gemma2.weights import CheckpointError, shown


def read_tokenizer(file: File, vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """Give the `tokenizers.Tokenizer` of a file and its ``tokenizer_config.json``."""
    kind = file.text("tokenizer.ggml.model")
    if kind != "llama":
        raise UnfaithfulError(f"its vocabulary is of the kind {shown(kind or 'none')}")
    if file.flag("tokenizer.ggml.add_space_prefix") is not False:
        raise UnfaithfulError("its vocabulary adds a space before a text")
    if file.flag("tokenizer.ggml.remove_extra_whitespaces"):
        raise UnfaithfulError("its vocabulary drops spaces")
    listed = file.values.get("tokenizer.ggml.tokens")
    if listed is None or listed.count != vocab_size:
        count = 0 if listed is None else listed.count
        raise UnfaithfulError(f"it has {count} tokens for {vocab_size} embeddings")
    pieces = file.texts("tokenizer.ggml.tokens")
    scores = file.numbers("tokenizer.ggml.scores")
    types = file.numbers("tokenizer.ggml.token_type")
    if pieces is None or scores is None or types is None:
        raise UnfaithfulError("it has no scores or no types of its tokens")
    held = Vocabulary([piece.replace(" ", SPACE) for piece in pieces], scores, types)

    def piece(key: str) -> str | None:
        number = file.integer(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not 0 <= number < vocab_size:
            raise UnfaithfulError(f"its {key}_token_id is {number}, which is no token")
        return None if number is None else held.pieces[number]

    special = {"bos": piece("bos"), "eos": piece("eos"), "pad": piece("padding")}
    add_bos = file.flag("tokenizer.ggml.add_bos_token") is not False and special["bos"] is not None
    config: dict[str, Any] = {
        "add_bos_token": add_bos,
        "add_eos_token": bool(file.flag("tokenizer.ggml.add_eos_token")),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": next(iter(held.of_type(vocabulary.UNKNOWN)), None),
        **{f"{key}_token": text for key, text in special.items() if text is not None},
    }
    template = file.text("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return vocabulary.to_tokenizer(held, special["bos"] if add_bos else None), config


def _vocabulary(source: Source) -> tuple[Vocabulary | None, dict[str, Any]]:
    """Give the vocabulary beside a source, None where there is none, and its settings."""
    files = {file.name: file for file in source.tokenizer}
    config: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        config = read_json(files["tokenizer_config.json"])
    if "chat_template.jinja" in files:
        try:
            config["chat_template"] = files["chat_template.jinja"].read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{files['chat_template.jinja']}: it is not UTF-8") from error
    added = read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
    size = source.config.vocab_size
    reason = "there is no tokenizer beside the weights"
    for name, read in (
        ("tokenizer.model", vocabulary.from_model),
        ("tokenizer.json", vocabulary.from_json),
    ):
        if name in files:
            try:
                return read(files[name]).marked(config, added).padded(size), config
            except UnfaithfulError as error:
                reason = f"{files[name]}: {error}"
    warnings.warn(
        f"the GGUF file gets no tokenizer, programs can give it token ids only: {reason}",
        stacklevel=2,
    )
    return None, config


def add_tokenizer(writer: Any, source: Source) -> None:
    """Add the vocabulary beside `source` to a `gguf.GGUFWriter`; warn where there is none."""
    held, settings = _vocabulary(source)
    if held is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        raw = [
            piece.replace(SPACE, " ") if kind == vocabulary.USER_DEFINED else piece
            for piece, kind in zip(held.pieces, held.types.tolist(), strict=True)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(raw)
        writer.add_token_scores(held.scores.tolist())
        writer.add_token_types(held.types.tolist())
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(bool(settings.get("add_bos_token", True)))
        writer.add_add_eos_token(bool(settings.get("add_eos_token", False)))
        unknown = np.flatnonzero(held.types == vocabulary.UNKNOWN)
        if len(unknown):
            writer.add_unk_token_id(int(unknown[0]))
        if isinstance(settings.get("chat_template"), str):
            writer.add_chat_template(settings["chat_template"])
