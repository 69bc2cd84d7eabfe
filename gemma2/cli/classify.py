"""`gemma2 classify`: tell which class a text, or each of its tokens, belongs to."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import gemma2
from gemma2.cli.options import Commands, count, weights_options
from gemma2.cli.shared import (
    device_of,
    dtype_of,
    embedded,
    model_folder,
    set_threads,
    texts_of,
)

if TYPE_CHECKING:
    import torch

    from gemma2 import Gemma2Config, Tokenizer

__all__ = ["add"]

EXAMPLES = """\
The embedded model tells which of WordNet's 45 lexicographer classes a definition belongs to.

examples:
  gemma2 classify "a large wild cat with stripes"
  gemma2 classify --top 3 --json "move very fast on foot"
  gemma2 classify --tokens "bird: a small animal that flies; the bird sang"
  gemma2 classify --model my-classifier "I liked this film"
"""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    classify = commands.add(
        "classify", _run, "tell which class a text belongs to", EXAMPLES, weights_options()
    )
    classify.add_argument("text", nargs="+", metavar="TEXT", help="texts; - reads stdin")
    classify.add_argument(
        "--top", type=count, default=5, metavar="N", help="show the N most probable classes (5)"
    )
    classify.add_argument("--tokens", action="store_true", help="classify every token of the text")


def _run(args: argparse.Namespace) -> None:
    texts = texts_of(args.text)
    set_threads(args)
    model, tokenizer = _load_classifier(args)
    if args.tokens:
        _classify_tokens(args, model, tokenizer, texts)
    else:
        _classify_texts(args, model, tokenizer, texts)


def _load_classifier(args: argparse.Namespace) -> tuple[Any, Tokenizer]:
    if args.model is None:
        embedded()
        from gemma2 import tiny

        load = tiny.load_token_classifier if args.tokens else tiny.load_sequence_classifier
        return load(dtype_of(args)).to(device_of(args)), tiny.load_tokenizer()
    folder = model_folder(args.model)
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    head = (
        gemma2.Gemma2ForTokenClassification
        if args.tokens
        else gemma2.Gemma2ForSequenceClassification
    )
    return head.from_pretrained(folder, dtype=dtype_of(args), device=device_of(args)), tokenizer


def _scores(config: Gemma2Config, logits: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Give what the logits [.., num_labels] mean, and what to call it."""
    logits = logits.float()
    if config.problem_type == "regression" or config.num_labels == 1:
        return logits, "value"
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid(), "probability"
    return logits.softmax(-1), "probability"


def _label(config: Gemma2Config, number: int) -> str:
    return str((config.id2label or {}).get(number, f"LABEL_{number}"))


def _classify_texts(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, texts: list[str]
) -> None:
    import torch

    read = texts
    if args.model is None:
        from gemma2 import tiny

        read = [tiny.classify_prompt(text) for text in texts]
    with torch.inference_mode():
        # one by one: without padding, and without a pad token being needed
        logits = torch.cat(
            [model(tokenizer(text)["input_ids"].to(model.device)).logits for text in read]
        )
    scores, name = _scores(model.config, logits)
    for number, (text, row) in enumerate(zip(texts, scores, strict=True)):
        best = row.topk(min(args.top, len(row)))
        found = [
            {"label": _label(model.config, int(i)), name: float(v)}
            for v, i in zip(best.values, best.indices, strict=True)
        ]
        if args.json:
            print(json.dumps({"text": text, "classes": found}), flush=True)
            continue
        if len(texts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {text}")
        for item in found:
            print(f"{item[name]:7.4f}  {item['label']}", flush=True)


def _classify_tokens(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, texts: list[str]
) -> None:
    import torch

    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=model.device)).logits[0]
        scores, name = _scores(model.config, logits)
        found = []
        for token, row in zip(ids, scores, strict=True):
            if token == tokenizer.bos_id:
                continue
            best = int(row.argmax())
            found.append(
                {
                    "token": tokenizer.decode([token], skip_special_tokens=False),
                    "id": token,
                    "label": _label(model.config, best),
                    name: float(row[best]),
                }
            )
        if args.json:
            print(json.dumps({"text": text, "tokens": found}), flush=True)
            continue
        if len(texts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {text}")
        width = max((len(repr(item["token"])) for item in found), default=0)
        for item in found:
            print(f"{item['token']!r:{width}}  {item[name]:.4f}  {item['label']}", flush=True)
