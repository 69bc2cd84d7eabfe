"""Assisted decoding in cases drawn at random: the tokens are those of the model alone, every one.

Deterministic mode, in which a row's bits depend neither on the batch nor on how many tokens a call
has, so that no draw can fall otherwise by rounding. GEMMA2_ASSISTED_CASES says how many cases there
are; `python -m tests.model.test_assisted_cases 0 1000` runs these, and counts.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import sys
from typing import Any

import pytest
import torch

from gemma2 import Gemma2ForCausalLM, HybridCache
from tests.model.factories import config, lively, load, padded, tokens
from tests.model.recorded_graph import as_on_a_device

CASES = int(os.environ.get("GEMMA2_ASSISTED_CASES", "60"))
SAMPLING: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.2},
    {"do_sample": True, "min_p": 0.05, "temperature": 1.5},
]


@functools.cache
def model_of(window: int, noise: float = 0.0) -> Any:
    """The lively model; with noise another one, more or less of its opinion."""
    cfg = config("three", tie_word_embeddings=False, sliding_window=window)
    model = Gemma2ForCausalLM(cfg)
    load(model, lively("three").state_dict())
    if noise:
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            weight.data += torch.randn(weight.shape, generator=generator) * weight.std() * noise
    return model.eval()


def drafting(draw: random.Random, window: int) -> dict[str, Any]:
    if draw.random() < 0.5:
        return {
            "prompt_lookup_num_tokens": draw.choice([1, 2, 3, 5, 9]),
            "max_matching_ngram_size": draw.randint(1, 4),
        }
    assistant = draw.choice([model_of(window, n) for n in (0.05, 0.2, 1.0)] + [lively("27b")])
    return {"assistant_model": assistant, "num_assistant_tokens": draw.choice([1, 2, 5, 8])}


def run_case(seed: int) -> dict[str, Any]:
    """Run a conversation of one to three turns with and without help; give what it was like."""
    draw = random.Random(seed)
    window = draw.choice([8, 100, 116])
    model = model_of(window)
    rows, side = draw.choice([1, 1, 2, 3]), draw.choice(["left", "right"])
    sampling = {**draw.choice(SAMPLING)}
    repeats = draw.choice([1, 2]) if sampling.get("do_sample") else 1
    help, turns = drafting(draw, window), draw.choice([1, 1, 2, 3])
    options = {**sampling, "seed": seed, "num_return_sequences": repeats}
    options["prefill_chunk_size"] = draw.choice([None, 1 + draw.randrange(150)])
    options["eos_token_id"] = draw.choice([[], draw.sample(range(3, 97), 3)])
    repetitive = draw.random() < 0.3
    texts = []
    for row in range(rows):
        n = draw.choice([1, 2, 7, 60, 126, 130, 180])
        text = tokens(1, n, seed=seed * 7 + row)[0].tolist()
        texts.append((text[:5] * n)[:n] if repetitive else text)
    caches = None
    if turns > 1 or draw.random() < 0.3:
        caches = [
            HybridCache(model.config, rows * repeats, margin=9, keep_snapshots=keep)
            for keep in (0, draw.randint(0, 2))
        ]
    on_device = draw.random() < 0.15
    longest = 0
    for turn in range(turns):
        ids, mask = padded([torch.tensor(text) for text in texts], side)
        call = {**options, "attention_mask": mask, "max_new_tokens": draw.choice([1, 2, 20, 50])}
        given = [{} if caches is None else {"past_key_values": cache} for cache in caches or (0, 0)]
        wanted = model.generate(ids, **call, **given[0])
        if on_device:
            with as_on_a_device():
                found = model.generate(ids, **call, **given[1], **help)
        else:
            found = model.generate(ids, **call, **given[1], **help)
        assert torch.equal(found, wanted), f"case {seed}, turn {turn}: {options} {help}"
        if caches is not None:
            assert caches[0].text == caches[1].text
            assert torch.equal(caches[0].lengths, caches[1].lengths)
            longest = max(longest, caches[0].get_seq_length())
            texts = [caches[0].text[row * repeats] for row in range(rows)]
        fresh = [tokens(1, draw.randint(2, 60), seed=seed + turn + row)[0] for row in range(rows)]
        texts = [text + more.tolist() for text, more in zip(texts, fresh, strict=True)]
        longest = max(longest, found.shape[1])
    return {"rows": rows * repeats, "wrapped": longest > 128}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("first", range(0, CASES, 20))
def test_any_text_written_with_help_is_the_one_without(deterministic, first):
    cases = [run_case(seed) for seed in range(first, min(first + 20, CASES))]
    assert sum(case["wrapped"] for case in cases) >= len(cases) // 4


# ---- distribution -------------------------------------------------------------------------------


def test_a_sampled_token_is_distributed_as_the_model_says_whatever_drafts():
    """Pearson's chi-square of pairs of tokens, over seeds, against the products of probabilities."""
    cfg = config("three", vocab_size=6, sliding_window=8, pad_token_id=0, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(cfg).eval()
    other = copy.deepcopy(model)
    for weight in (*model.parameters(), *other.parameters()):
        weight.data += torch.randn_like(weight) * 0.15
    ids = torch.tensor([[3, 4, 5, 3]])
    rows, seeds = 500, 4
    with torch.no_grad():
        first = model(ids).logits[0, -1].softmax(-1)
        longer = torch.cat([ids.repeat(6, 1), torch.arange(6)[:, None]], dim=1)
        second = model(longer).logits[:, -1].softmax(-1)
        theirs = other(longer).logits[:, -1].softmax(-1)
    assert float((second - theirs).abs().sum(1).max()) > 0.1, "the assistant thinks otherwise"
    expected = (first[:, None] * second).flatten().double() * rows * seeds
    options = {"do_sample": True, "num_return_sequences": rows, "eos_token_id": [], "top_k": 0}
    for help in ({"assistant_model": other}, {"prompt_lookup_num_tokens": 2}):
        counts = torch.zeros(36)
        for seed in range(seeds):
            out = model.generate(ids, max_new_tokens=3, seed=seed, **options, **help)
            counts += torch.bincount(out[:, 4] * 6 + out[:, 5], minlength=36)
        statistic = float(((counts - expected) ** 2 / expected).sum())
        # 35 degrees of freedom: more than 66.6 once in a thousand
        assert statistic < 66.6, f"{help}: {statistic:.1f}"
        wrong = (first[:, None] * theirs).flatten().double() * rows * seeds
        assert float(((counts - wrong) ** 2 / wrong).sum()) > 66.6, "the test tells them apart"


def main(first: int, count: int) -> int:
    torch.use_deterministic_algorithms(os.environ.get("GEMMA2_ASSISTED_ROUNDING") is None)
    failed, wrapped, rows = [], 0, 0
    for seed in range(first, first + count):
        try:
            case = run_case(seed)
        except AssertionError as error:
            failed.append(seed)
            print(error, flush=True)
            continue
        wrapped, rows = wrapped + case["wrapped"], rows + case["rows"]
    print(
        f"{count} cases, {len(failed)} failed {failed}; {wrapped} with wrapped rings, {rows} rows"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
