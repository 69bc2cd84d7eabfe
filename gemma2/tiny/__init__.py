"""The embedded model: a Gemma 2 of four million parameters, trained on WordNet's definitions.

It writes a definition of a word or phrase, sorts a definition into one of WordNet's 45
lexicographer classes, and tells definition, example sentence and headword apart. One body serves
all three; what it is worth is in README.md beside this file, and how it was made in
examples/train_tiny.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from gemma2.config import Gemma2Config
from gemma2.heads import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
)
from gemma2.tokenizer import Tokenizer

__all__ = [
    "MARKER",
    "TOKEN_LABELS",
    "classify_prompt",
    "load_causal_lm",
    "load_sequence_classifier",
    "load_token_classifier",
    "load_tokenizer",
    "path",
    "prompt",
]

Model = TypeVar("Model", bound=nn.Module)

MARKER = ":"  # between a headword and its definition
TOKEN_LABELS = ("definition", "example", "headword")


def path() -> Path:
    """Give the folder that holds the model: config.json, model.safetensors, tokenizer.json, ..."""
    return Path(__file__).resolve().parent


def prompt(text: str) -> str:
    """Give what the causal model continues with a definition of `text`: "dog" -> "dog:"."""
    return text.strip().rstrip(MARKER).rstrip() + MARKER


def classify_prompt(text: str) -> str:
    """Give what the sequence head reads for a definition `text`: the document without headword."""
    return f"{MARKER} {text.strip()}"


def load_tokenizer() -> Tokenizer:
    """Give the model's tokenizer. It lower-cases and puts BOS in front."""
    return Tokenizer.from_pretrained(path())


def load_causal_lm(dtype: torch.dtype | str | None = None) -> Gemma2ForCausalLM:
    """Give the model that writes definitions, in eval mode; dtype None: bfloat16, as stored."""
    return Gemma2ForCausalLM.from_pretrained(path(), dtype=dtype)


def load_sequence_classifier(
    dtype: torch.dtype | str | None = None,
) -> Gemma2ForSequenceClassification:
    """Give the model with the head for the 45 lexicographer classes; config.id2label names them."""
    lm = load_causal_lm(dtype)
    return _with_head(Gemma2ForSequenceClassification, lm.config, lm, "sequence.")


def load_token_classifier(dtype: torch.dtype | str | None = None) -> Gemma2ForTokenClassification:
    """Give the model with the head that labels tokens; config.id2label gives TOKEN_LABELS."""
    lm = load_causal_lm(dtype)
    config = Gemma2Config.from_dict(
        lm.config.to_dict(),
        num_labels=len(TOKEN_LABELS),
        id2label=dict(enumerate(TOKEN_LABELS)),
        label2id={name: number for number, name in enumerate(TOKEN_LABELS)},
    )
    return _with_head(Gemma2ForTokenClassification, config, lm, "token.")


def _with_head(
    cls: Callable[[Gemma2Config], Model], config: Gemma2Config, lm: Gemma2ForCausalLM, prefix: str
) -> Model:
    """Build `cls` on the meta device and give it lm's body and the head stored under `prefix`."""
    weights = {f"model.{name}": tensor for name, tensor in lm.model.state_dict().items()}
    for name, tensor in load_file(path() / "heads.safetensors").items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = tensor.to(lm.dtype)
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()
