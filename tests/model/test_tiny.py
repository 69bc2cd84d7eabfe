"""The embedded model is what its card says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gemma2
from gemma2 import tiny

DEFINITION, EXAMPLE, HEADWORD = range(3)


@pytest.fixture(scope="module")
def lm() -> gemma2.Gemma2ForCausalLM:
    return tiny.load_causal_lm()


@pytest.fixture(scope="module")
def tokenizer() -> gemma2.Tokenizer:
    return tiny.load_tokenizer()


@pytest.fixture(scope="module")
def classifier() -> gemma2.Gemma2ForSequenceClassification:
    return tiny.load_sequence_classifier()


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((tiny.path() / "figures.json").read_text(encoding="utf-8"))


def ids_of(tokenizer: gemma2.Tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text)])


def test_it_has_every_peculiarity_of_gemma_2(lm: gemma2.Gemma2ForCausalLM) -> None:
    config = lm.config
    assert lm.dtype == torch.bfloat16
    assert 3e6 <= sum(p.numel() for p in lm.parameters()) <= 6e6
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50, 30)
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.query_pre_attn_scalar != config.head_dim
    assert config.tie_word_embeddings
    windows = [config.layer_window(i) for i in range(config.num_hidden_layers)]
    assert set(windows[0::2]) == {config.sliding_window}
    assert set(windows[1::2]) == {0}


def test_the_licence_and_the_card_travel_with_it() -> None:
    assert "Princeton University" in (tiny.path() / "LICENSE.wordnet").read_text(encoding="utf-8")
    assert "held out" in (tiny.path() / "README.md").read_text(encoding="utf-8")


def test_a_greedy_definition_is_the_same_every_time(
    lm: gemma2.Gemma2ForCausalLM, tokenizer: gemma2.Tokenizer
) -> None:
    ids = ids_of(tokenizer, tiny.prompt("a small bird"))
    first, second = (
        lm.generate(ids, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(first[:, : ids.shape[1]], ids)
    text = tokenizer.decode(first[0, ids.shape[1] :])
    assert len(text.split()) >= 3
    assert "bird" in text  # what it is about


def test_a_definition_ends(lm: gemma2.Gemma2ForCausalLM, tokenizer: gemma2.Tokenizer) -> None:
    ids = ids_of(tokenizer, tiny.prompt("music"))
    drawn = lm.generate(
        ids.expand(8, -1), max_new_tokens=100, do_sample=True, temperature=0.8, seed=1
    )
    assert (drawn == tokenizer.eos_id).any(dim=1).sum() >= 6


def test_perplexity_is_the_cards_and_better_than_five_grams(
    lm: gemma2.Gemma2ForCausalLM, tokenizer: gemma2.Tokenizer, figures: dict[str, Any]
) -> None:
    sample = figures["sample"]
    loss, count = 0.0, 0
    with torch.inference_mode():
        for document in sample["documents"]:
            head = document[0][0] + tiny.MARKER
            text = "".join(piece for piece, _ in document)
            assert text.startswith(head)
            given = len(tokenizer.encode(head))
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
            logits = lm(ids).logits[0, given - 1 : -1].float()
            loss += F.cross_entropy(logits, ids[0, given:], reduction="sum").item()
            count += ids.shape[1] - given
    perplexity = math.exp(loss / count)
    # bfloat16 rounds differently by instruction set and batch
    assert perplexity == pytest.approx(sample["perplexity"], rel=0.01)
    # the sample is too small to rank the two, all held-out documents are not
    assert figures["perplexity"] < 0.95 * figures["perplexity_5gram"]


@pytest.mark.parametrize(
    ("gloss", "label"),
    [
        ("a large wild cat with stripes", "noun.animal"),
        ("a tree with edible red fruit", "noun.plant"),
        ("a person who repairs machines", "noun.person"),
        ("a vehicle with two wheels", "noun.artifact"),
        ("in a careful manner", "adv.all"),
        ("move quickly on foot", "verb.motion"),
    ],
)
def test_plain_glosses_get_their_class(
    classifier: gemma2.Gemma2ForSequenceClassification,
    tokenizer: gemma2.Tokenizer,
    gloss: str,
    label: str,
) -> None:
    with torch.inference_mode():
        logits = classifier(ids_of(tokenizer, tiny.classify_prompt(gloss))).logits
    assert logits.shape == (1, 45)
    assert classifier.config.id2label[int(logits.argmax())] == label


def test_classes_of_held_out_glosses_beat_the_bag_of_words(
    classifier: gemma2.Gemma2ForSequenceClassification,
    tokenizer: gemma2.Tokenizer,
    figures: dict[str, Any],
) -> None:
    sample = figures["sample"]
    glosses = [
        "".join(text for text, label in document if label == DEFINITION)
        for document in sample["documents"]
    ]
    batch = tokenizer([tiny.classify_prompt(gloss) for gloss in glosses], padding_side="left")
    with torch.inference_mode():
        found = classifier(**batch).logits.argmax(-1)
    right = [
        classifier.config.id2label[int(number)] == label
        for number, label in zip(found, sample["classes"], strict=True)
    ]
    assert sum(right) / len(right) > 0.6  # 48 glosses: twenty points of slack
    assert figures["class_accuracy"] > figures["class_accuracy_bag_of_words"]


def test_tokens_are_told_apart(tokenizer: gemma2.Tokenizer, figures: dict[str, Any]) -> None:
    tagger = tiny.load_token_classifier()
    assert tuple(tagger.config.id2label.values()) == tiny.TOKEN_LABELS
    pieces = [
        ("dog", HEADWORD),
        (":", None),
        (" a common animal that people keep", DEFINITION),
        ('; "the', EXAMPLE),
        (" dog", HEADWORD),
        (' barked all night"', EXAMPLE),
    ]
    ids, wanted = [tokenizer.bos_id], [None]
    for text, label in pieces:
        new = tokenizer.encode(text, add_bos=False)
        ids += new
        wanted += [label] * len(new)
    assert ids == tokenizer.encode("".join(text for text, _ in pieces))
    with torch.inference_mode():
        found = tagger(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    asked = [(f, w) for f, w in zip(found, wanted, strict=True) if w is not None]
    assert sum(f == w for f, w in asked) >= len(asked) - 1
    assert figures["token_accuracy"] > figures["token_neighbours_accuracy"]
    assert figures["token_f1_headword"] > figures["token_neighbours_f1_headword"]


def test_the_tokenizer_lowers_case_and_loses_nothing_else(tokenizer: gemma2.Tokenizer) -> None:
    text = 'Naïve: 12 "Bücher" (日本), 3.5 %'
    assert tokenizer.decode(tokenizer.encode(text)) == text.lower()
    assert tokenizer.encode("dog")[0] == tokenizer.bos_id
    assert len(tokenizer.encode("dog", add_bos=False)) == 1


def test_prompts_are_marked_once() -> None:
    assert tiny.prompt(" a small bird ") == tiny.prompt("a small bird:") == "a small bird:"
    assert tiny.classify_prompt("a bird ") == ": a bird"
