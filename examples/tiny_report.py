"""Score the embedded model against the baselines; write its README.md and figures.json."""

from __future__ import annotations

import json
import math
import platform
import random
import textwrap
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tiny_baselines
import tiny_data
import torch
import torch.nn.functional as F
import wordnet
from tiny_data import BOS, IGNORE, Row
from tokenizers import Tokenizer
from tqdm import tqdm

import gemma2

SAMPLE = 48  # held-out documents that travel with the model, for its test
SHOWN = (
    "a small bird",
    "dog",
    "happiness",
    "to run slowly",
    "computer",
    "blue",
    "quickly",
    "a wooden boat",
)


def write(
    out: Path,
    documents: wordnet.Documents,
    training: Sequence[wordnet.Synset],
    held_out: Sequence[wordnet.Synset],
    run: dict[str, str],
) -> None:
    """Score what lies in `out` and write both files there."""
    start = time.monotonic()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    rows = tiny_data.encode(tokenizer, [documents.evaluation_document(s) for s in held_out])
    glosses = tiny_data.encode(tokenizer, [gloss(synset) for synset in held_out])
    models = load(out)
    config = models[0].config
    figures: dict[str, Any] = {
        **run,
        "parameters": sum(p.numel() for p in models[0].parameters())
        + sum(p.numel() for model in models[1:] for p in model.score.parameters()),
        "training_synsets": len(training),
        "held_out_synsets": len(held_out),
        "target_tokens": sum(sum(row.is_target) for row in rows),
    }
    figures |= model_figures(*models, rows, glosses)
    figures |= baseline_figures(documents, training, held_out, rows, tokenizer, config.vocab_size)

    order = sorted(range(len(held_out)), key=lambda i: sha256(held_out[i].key.encode()).digest())
    order = order[:SAMPLE]
    sample = [rows[i] for i in order]
    figures["sample"] = {
        "documents": [pieces(documents.evaluation_document(held_out[i])) for i in order],
        "classes": [wordnet.CLASSES[held_out[i].label] for i in order],
        "perplexity": model_figures(*models, sample, [glosses[i] for i in order])["perplexity"],
        "perplexity_5gram": figures.pop("kneser_ney").perplexity(sample),
    }
    examples = [(text, define(models[0], tokenizer, text)) for text in SHOWN]
    figures["report_minutes"] = round((time.monotonic() - start) / 60, 1)
    rounded = json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 4))
    write_text(out / "figures.json", json.dumps(rounded, indent=1) + "\n")
    write_text(out / "README.md", card(rounded, config, examples, out))
    print(card_table(rounded))


def load(out: Path) -> tuple[Any, Any, Any]:
    """The three models on the body in `out`, by the package's own loaders."""
    if out.resolve() != gemma2.tiny.path():
        gemma2.tiny.path = lambda: out.resolve()  # the loaders read where the model was written
    return (
        gemma2.tiny.load_causal_lm(),
        gemma2.tiny.load_sequence_classifier(),
        gemma2.tiny.load_token_classifier(),
    )


def gloss(synset: wordnet.Synset) -> wordnet.Document:
    """What the sequence head reads: the definition alone, without headword and examples."""
    return wordnet.Document(
        synset, ((wordnet.MARKER, None), (" " + synset.definition, wordnet.DEFINITION))
    )


def pieces(document: wordnet.Document) -> list[list[Any]]:
    return [[text, label] for text, label in document.pieces]


@torch.inference_mode()
def model_figures(
    lm: Any, classifier: Any, tagger: Any, rows: Sequence[Row], glosses: Sequence[Row]
) -> dict[str, float]:
    """Perplexity of the tokens after the marker, accuracy of classes, scores of token labels."""
    loss = count = right = among_three = 0.0
    predicted, true = [], []
    for group in tqdm(tiny_data.batches(rows, 2048), desc="held-out documents", leave=False):
        batch = tiny_data.collate(group)
        logits = lm(batch.ids, batch.mask, use_cache=False).logits.float()
        loss += F.cross_entropy(
            logits.flatten(0, 1), batch.next_ids.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += (batch.next_ids != IGNORE).sum().item()
        asked = batch.token_labels != IGNORE
        predicted.append(tagger(batch.ids, batch.mask).logits.argmax(-1)[asked])
        true.append(batch.token_labels[asked])
    for group in tiny_data.batches(glosses, 2048):
        group = [without_eos(row) for row in group]
        batch = tiny_data.collate(group)
        best = classifier(batch.ids, batch.mask).logits.float().topk(3).indices
        right += (best[:, 0] == batch.classes).sum().item()
        among_three += (best == batch.classes[:, None]).sum().item()
    figures = {
        "perplexity": math.exp(loss / count),
        "class_accuracy": right / len(glosses),
        "class_accuracy_top3": among_three / len(glosses),
    }
    return figures | token_scores("token", torch.cat(predicted).numpy(), torch.cat(true).numpy())


def without_eos(row: Row) -> Row:
    cut = len(row) - (row.ids[-1] == tiny_data.EOS)
    return Row(row.ids[:cut], row.labels[:cut], row.is_target[:cut], row.label)


def token_scores(prefix: str, predicted: Any, true: Any) -> dict[str, float]:
    """Accuracy, and F1 of each label."""
    figures = {f"{prefix}_accuracy": float((predicted == true).mean())}
    for number, name in enumerate(wordnet.TOKEN_LABELS):
        both = ((predicted == number) & (true == number)).sum()
        figures[f"{prefix}_f1_{name}"] = float(
            2 * both / max((predicted == number).sum() + (true == number).sum(), 1)
        )
    return figures


def baseline_figures(
    documents: wordnet.Documents,
    training: Sequence[wordnet.Synset],
    held_out: Sequence[wordnet.Synset],
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    vocab_size: int,
) -> dict[str, Any]:
    """The baselines' figures; `kneser_ney` is the 5-gram model itself.

    It is fitted on documents drawn as for training and on one document a synset; the better one
    counts.
    """
    rng = random.Random(0)
    drawn = tiny_data.encode(tokenizer, [documents.training_document(s, rng) for s in training])
    first = tiny_data.encode(tokenizer, [documents.evaluation_document(s) for s in training])
    models = [tiny_baselines.KneserNey(fitted, vocab_size) for fitted in (drawn, first)]
    kneser_ney = min(models, key=lambda model: model.perplexity(rows))
    print("5-gram model fitted", flush=True)
    labels = [s.label for s in training], [s.label for s in held_out]
    texts = [s.definition for s in training], [s.definition for s in held_out]
    words = tiny_baselines.bag_of_words((texts[0], labels[0]), (texts[1], labels[1]))
    print("bag of words fitted", flush=True)
    predicted, true = tiny_baselines.neighbours(first[::5], rows, vocab_size)
    most = np.full_like(true, np.bincount(true).argmax())
    return {
        "kneser_ney": kneser_ney,
        "perplexity_5gram": kneser_ney.perplexity(rows),
        "class_accuracy_majority": tiny_baselines.majority(*labels),
        "class_accuracy_bag_of_words": words,
        **token_scores("token_majority", most, true),
        **token_scores("token_neighbours", predicted, true),
    }


def define(lm: Any, tokenizer: Tokenizer, text: str) -> str:
    """The greedy definition of `text`."""
    ids = torch.tensor([tokenizer.encode(gemma2.tiny.prompt(text)).ids])
    assert ids[0, 0] == BOS
    new = lm.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new.tolist()).strip()


def card_table(f: dict[str, Any]) -> str:
    rows = [
        (
            "Perplexity per token after the headword",
            "perplexity",
            "{:.1f}",
            ["5-gram, modified Kneser-Ney", "perplexity_5gram"],
        ),
        (
            "Class of a gloss, accuracy",
            "class_accuracy",
            "{:.1%}",
            ["bag-of-words logistic regression", "class_accuracy_bag_of_words"],
            ["majority class", "class_accuracy_majority"],
        ),
        (
            "Token labels, accuracy",
            "token_accuracy",
            "{:.1%}",
            ["logistic regression, token and neighbours", "token_neighbours_accuracy"],
            ["majority", "token_majority_accuracy"],
        ),
        (
            "Token labels, F1 of headword",
            "token_f1_headword",
            "{:.3f}",
            ["logistic regression, token and neighbours", "token_neighbours_f1_headword"],
        ),
        (
            "Token labels, F1 of example",
            "token_f1_example",
            "{:.3f}",
            ["logistic regression, token and neighbours", "token_neighbours_f1_example"],
        ),
    ]
    lines = ["| held out | this model | baselines |", "|---|---|---|"]
    for title, key, form, *baselines in rows:
        others = "; ".join(f"{name}: {form.format(f[other])}" for name, other in baselines)
        lines.append(f"| {title} | **{form.format(f[key])}** | {others} |")
    return "\n".join(lines)


def card(f: dict[str, Any], config: Any, examples: list[tuple[str, str]], out: Path) -> str:
    """README.md, from the figures."""
    size = sum((out / name).stat().st_size for name in ("model.safetensors", "heads.safetensors"))
    paragraphs = [
        "# The embedded model",
        f"A Gemma 2 of {f['parameters'] / 1e6:.2f} million parameters (bfloat16, {size / 1e6:.1f} "
        "MB), trained from scratch on the glosses of WordNet 3.0. It exists to show and to test "
        "the package without a download. Given a word or phrase it writes a dictionary-like "
        "definition; two heads on the same body name the lexicographer class of a definition and "
        "label its tokens.",
        '    gemma2 generate "a small bird"\n    gemma2 classify "a large wild cat with stripes"',
        "Greedy with repetition penalty, from the words before each colon (the tokenizer lower-cases):",
        "\n".join(f"    {text}: {definition}" for text, definition in examples),
        "It has learnt how definitions sound and what words are about, not facts. Do not look "
        "things up in it.",
        "## Figures",
        card_table(f),
        f"{f['held_out_synsets']:,} synsets were held out ({f['target_tokens']:,} predicted "
        'tokens). Perplexity counts every token after "headword:", the end included, given the '
        "headword, for both models with the same tokenizer. The classifier reads the definition "
        f"alone; for {f['class_accuracy_top3']:.1%} the right class is among its three likeliest. "
        "Token labels are scored on whole documents; the model reads them from left to right, the "
        "logistic regression also sees the token that follows. All figures are of the bfloat16 "
        "files in this folder as the package loads them; figures.json has them all.",
        "## Data",
        f"WordNet 3.0 (Debian package wordnet-base): {f['training_synsets']:,} synsets to train "
        'on, one document drawn per synset and epoch: `headword: definition; "example"` with a '
        "word of the synset (words whose usual meaning it is more often), with no headword (30 "
        "%), or with a phrase made of the definition's first words (15 %, nouns). Named "
        "individuals (persons, towns, ...) are left out. A synset is held out if the hash of its "
        "definition says so (5 %), so equal definitions stay on one side.",
        "## Architecture",
        f"Hidden size {config.hidden_size}, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of "
        f"{config.head_dim}, intermediate size {config.intermediate_size}, vocabulary "
        f"{config.vocab_size} (byte-pair encoding with byte fallback), sliding window "
        f"{config.sliding_window} on every other layer, caps {config.attn_logit_softcapping:g} "
        f"and {config.final_logit_softcapping:g}, query scalar {config.query_pre_attn_scalar:g}, "
        "tied head.",
        "## Training",
        f"    {f['command']}",
        f"{f['run']}, in float32 on {processor()}: Muon for the matrices inside the layers, AdamW "
        "for the rest, warm-up and cosine. The loss is a sum of three cross entropies: next "
        "token, class, token label.",
        "## Licence",
        "The weights are made from WordNet 3.0, Copyright 2006 by Princeton University, used "
        "under the licence in LICENSE.wordnet.",
    ]
    return "\n\n".join(map(wrapped, paragraphs)) + "\n"


def wrapped(paragraph: str) -> str:
    """A paragraph of prose in lines of 100; headings, tables and indented text as they are."""
    if paragraph.startswith(("#", "|", "    ")):
        return paragraph
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
