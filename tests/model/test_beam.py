"""Beam search finds what transformers' does, token for token, and reads the prompt once."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import HybridCache
from tests.model.factories import lively, padded, tokens, twin
from tests.model.recorded_graph import as_on_a_device

NEVER = {"eos_token_id": []}
PAD = 5  # transformers pads with eos where pad is 0


@pytest.fixture
def model():
    return lively("three")


@functools.cache
def theirs(shape):
    return twin(lively(shape).config, state=lively(shape).state_dict())


def assert_like_transformers(shape, ids, mask=None, eos=(), **options):
    """Tokens, scores and beams are those of transformers; gives our output."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {
        "attention_mask": mask,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": PAD,
        **options,
    }
    # a number that no token has: then nothing ends
    wanted = theirs(shape).generate(
        ids, do_sample=False, eos_token_id=list(eos) or 10**6, **options
    )
    found = lively(shape).generate(ids, eos_token_id=list(eos), **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.beam_indices, wanted.beam_indices.to(torch.int64))
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores)
    assert len(found.scores) == len(wanted.scores)
    for ours, other in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-4)
    return found


def frequent(shape, ids, mask, **options):
    """Tokens that beams come across, the most frequent ones first, to be ends of texts."""
    options = {**options, "num_return_sequences": options["num_beams"]}
    out = lively(shape).generate(ids, attention_mask=mask, **NEVER, **options)
    new = out[:, ids.shape[1] :].flatten()
    return torch.bincount(new).argsort(descending=True, stable=True)[:5].tolist()


SEARCHES = [
    {"num_beams": 2},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 5, "length_penalty": -0.7, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("search", SEARCHES, ids=range(len(SEARCHES)))
@pytest.mark.parametrize("shape", ["2b", "9b", "27b"])
def test_tokens_and_scores_are_those_of_transformers(shape, search):
    ids, mask = padded([tokens(1, 5)[0], tokens(1, 14, seed=1)[0]], "left")
    options = {"max_new_tokens": 12, **search}
    eos = frequent(shape, ids, mask, **options)
    returned = {"num_return_sequences": search["num_beams"]}
    for ends in ([], eos[:1], eos):
        out = assert_like_transformers(shape, ids, mask, ends, **options, **returned)
    if search.get("length_penalty", 0.0) < 1:
        assert ((out.beam_indices >= 0).sum(dim=1) < 12).any(), "some texts have ended early"


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_options_together_give_what_transformers_gives(data):
    shape = data.draw(st.sampled_from(["three", "single"]), "shape")
    draw = functools.partial(data.draw)
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3), "lengths")
    beams = draw(st.integers(2, 5), "beams")
    seed = draw(st.integers(0, 1000), "seed")
    ids, mask = padded([tokens(1, n, seed=seed + n)[0] for n in lengths], "left", PAD)
    new = draw(st.integers(1, 12), "new")
    options = {
        "num_beams": beams,
        "num_return_sequences": draw(st.integers(1, beams), "returned"),
        "length_penalty": draw(st.sampled_from([0.0, 1.0, -1.5, 0.3, 2.5]), "penalty"),
        "early_stopping": draw(st.sampled_from([True, False, "never"]), "stopping"),
        "max_new_tokens": new,
        "repetition_penalty": draw(st.sampled_from([1.0, 1.4, 0.8]), "repetition"),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 2, 3]), "ngram"),
        "min_new_tokens": draw(st.integers(0, new), "least"),
    }
    if min(lengths) < max(lengths):
        # to transformers padding is text
        options |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    free = {**options, "num_return_sequences": beams, "min_new_tokens": 0}
    out = lively(shape).generate(ids, attention_mask=mask, **free, **NEVER)[:, ids.shape[1] :]
    ends = {int(token) for token in draw(st.sets(st.sampled_from(out.flatten().tolist())), "ends")}
    assert_like_transformers(shape, ids, mask, sorted(ends - {PAD})[:3], **options)


def test_texts_go_on_even_when_all_the_best_ones_end_at_once():
    ids = tokens(1, 6)
    with torch.no_grad():
        eos = lively("three")(ids).logits[0, -1].topk(5).indices.tolist()
    options = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 3.0}
    options["early_stopping"] = "never"
    out = assert_like_transformers("three", ids, None, eos, max_new_tokens=9, **options)
    assert out.sequences.shape[1] == 6 + 9
    assert out.sequences_scores.min() > -1e3


WITH_5 = """
import json, sys
import torch, transformers
root = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(
    root, dtype=torch.float32, attn_implementation="eager"
)
for number, (ids, mask, options) in enumerate(json.load(open(f"{root}/calls.json"))):
    out = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False,
        return_dict_in_generate=True, output_scores=True, **options
    )
    kept = {"sequences": out.sequences}
    if options["num_beams"] > 1:
        kept |= {"scores": out.sequences_scores, "beams": out.beam_indices.to(torch.int64)}
    torch.save(kept, f"{root}/{number}.pt")
print("transformers", transformers.__version__)
"""


def test_transformers_5_finds_the_same(tmp_path):
    place = os.environ.get("GEMMA2_TEST_TRANSFORMERS5")
    if not place:
        pytest.skip("GEMMA2_TEST_TRANSFORMERS5 names no folder with transformers 5")
    model = lively("27b")
    model.save_pretrained(tmp_path)
    ids, mask = padded([tokens(1, 5)[0], tokens(1, 14, seed=1)[0]], "left")
    searches = [*SEARCHES, {"num_beams": 1, "no_repeat_ngram_size": 2, "min_new_tokens": 8}]
    calls = []
    for search in searches:
        options = {"max_new_tokens": 12, "num_return_sequences": search["num_beams"], **search}
        eos = frequent("27b", ids, mask, **options)[:2]
        calls.append(options | {"eos_token_id": eos, "pad_token_id": PAD})
    content = json.dumps([(ids.tolist(), mask.tolist(), options) for options in calls])
    (tmp_path / "calls.json").write_text(content)
    paths = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", WITH_5, str(tmp_path)],
        env=dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=paths),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "transformers 5." in done.stdout, done.stderr[-3000:]
    for number, options in enumerate(calls):
        wanted = torch.load(tmp_path / f"{number}.pt")
        found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        assert torch.equal(found.sequences, wanted["sequences"]), options
        if options["num_beams"] > 1:
            assert torch.equal(found.beam_indices, wanted["beams"]), options
            torch.testing.assert_close(found.sequences_scores, wanted["scores"])


def test_rings_may_wrap_while_texts_change_rows():
    ids = tokens(2, 120)  # the ring has 128 slots
    out = assert_like_transformers(
        "three", ids, num_beams=3, num_return_sequences=3, max_new_tokens=30
    )
    rows = torch.arange(3).repeat(2)
    assert (out.beam_indices % 3 != rows[:, None]).any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ends", [0, 3])
def test_each_row_of_unequal_prompts_gets_what_it_gets_alone(model, side, ends):
    """Where others are still being searched for, its own texts do not change any more."""
    rows = [tokens(1, n, seed=n)[0] for n in (3, 140, 11, 4)]
    ids, mask = padded(rows, side)
    options = {"num_beams": 3, "max_new_tokens": 25}
    eos = frequent("three", ids, mask, **options)[:ends]
    options |= {"num_return_sequences": 2, "eos_token_id": eos}
    out = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    widths = set()
    for b, row in enumerate(rows):
        alone = model.generate(row[None], **options)[:, len(row) :]
        widths.add(alone.shape[1])
        assert torch.equal(out[2 * b : 2 * b + 2, : alone.shape[1]], alone), b
        assert (out[2 * b : 2 * b + 2, alone.shape[1] :] == 0).all(), b
    assert (len(widths) > 1) == (ends > 0)


def test_the_prompt_is_read_once_for_all_beams(model):
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape[:2]))
    try:
        model.generate(tokens(2, 30), num_beams=4, max_new_tokens=4, prefill_chunk_size=16, **NEVER)
    finally:
        hook.remove()
    assert [tuple(shape) for shape in read] == [(2, 16), (2, 14), (8, 1), (8, 1), (8, 1)]


def test_a_beam_finds_texts_that_are_at_least_as_probable_as_the_greedy_one(model):
    ids = tokens(4, 9)
    options = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True}
    greedy = model.generate(ids, **options, **NEVER)
    own = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
    beams = model.generate(ids, num_beams=6, length_penalty=0.0, **options, **NEVER)
    assert (beams.sequences_scores >= own.sum(dim=1) - 1e-4).all()
    assert (beams.sequences_scores > own.sum(dim=1) + 1e-3).any()


def test_transition_scores_are_those_of_transformers_and_sum_to_the_sequences_scores():
    ids = tokens(2, 6)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 9}
    eos = frequent("three", ids, None, **options)
    out = assert_like_transformers("three", ids, None, eos, **options)
    given = out.sequences, out.scores, out.beam_indices
    ours = lively("three").compute_transition_scores(*given)
    for normalize in (False, True):
        wanted = theirs("three").compute_transition_scores(*given, normalize_logits=normalize)
        found = lively("three").compute_transition_scores(*given, normalize_logits=normalize)
        torch.testing.assert_close(found, wanted)
    lengths = (out.beam_indices >= 0).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    torch.testing.assert_close(ours.sum(dim=1) / lengths, out.sequences_scores)


@pytest.mark.parametrize("length", [9, 120])
def test_a_device_that_the_host_does_not_look_into_gives_the_same(model, length):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, length)[0]], "left")
    options = {
        "attention_mask": mask,
        "num_beams": 3,
        "num_return_sequences": 2,
        "pad_token_id": PAD,
    }
    eos = frequent("three", ids, mask, num_beams=3, max_new_tokens=20)[:2]
    options |= {"max_new_tokens": 20, "eos_token_id": eos, "no_repeat_ngram_size": 2}
    caches = [HybridCache(model.config, 6, 200) for _ in range(2)]
    wanted = model.generate(ids, past_key_values=caches[0], **options)
    with as_on_a_device() as graphs:
        out = model.generate(ids, past_key_values=caches[1], **options)
    assert torch.equal(out, wanted)
    assert caches[0].text == caches[1].text
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert not graphs


def test_rows_of_the_cache_that_are_not_in_the_batch_stay(model):
    cache = HybridCache(model.config, 4, 100)
    ids = tokens(4, 9)
    model.generate(ids, max_new_tokens=3, past_key_values=cache, **NEVER)
    text = cache.text[3]
    model.generate(ids[:1], num_beams=3, max_new_tokens=5, past_key_values=cache, **NEVER)
    assert cache.text[3] == text
    assert int(cache.lengths[3]) == len(text)


def test_embeddings_in_the_place_of_ids(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "right")
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 7, **NEVER}
    out = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(out, model.generate(ids, **options)[:, 9:])


# ---- sampling -----------------------------------------------------------------------------------


def test_beam_sampling_is_repeatable_and_zero_temperature_is_plain_beam_search(model):
    ids = tokens(2, 6)
    options = {"num_beams": 3, "max_new_tokens": 9, "do_sample": True, **NEVER}
    wild = {"temperature": 2.0, "top_k": 0}
    outs = [model.generate(ids, seed=seed, **options, **wild) for seed in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    cold = model.generate(ids, **options, temperature=0)
    assert torch.equal(cold, model.generate(ids, **{**options, "do_sample": False}))
    torch.manual_seed(3)
    first = model.generate(ids, **options, **wild)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **options, **wild), first)


def test_candidates_are_drawn_like_those_of_transformers(model):
    """The distribution of texts of one token: two draws without replacement, the better one wins."""
    ids = tokens(1, 6)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 5, "max_new_tokens": 1}
    runs = 1500
    many = ids.expand(runs, -1)
    out = model.generate(many, num_beams=2, seed=9, **options, **NEVER)[:, -1]
    counts = torch.bincount(out, minlength=97) / runs
    with torch.no_grad():
        scores = torch.log_softmax(model(ids).logits[0, -1].float(), -1) / 1.5
    top = scores.topk(5)
    p = top.values.softmax(-1)
    # four candidates of five: the best one is missing only where it is not drawn at all
    missing = sum(
        math.prod(
            float(p[i]) / (1 - sum(float(p[j]) for j in order[:n])) for n, i in enumerate(order)
        )
        for order in orders_without(0, 5, 4)
    )
    assert counts[top.indices[0]] == pytest.approx(1 - missing, abs=0.04)
    assert counts[top.indices[0]] + counts[top.indices[1]] == pytest.approx(1.0)


def orders_without(left_out, count, length):
    return itertools.permutations([i for i in range(count) if i != left_out], length)


def test_filters_leave_enough_candidates_to_go_on_with(model):
    ids = tokens(1, 6)
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 8, "num_return_sequences": 4}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        out = model.generate(ids, num_beams=4, **options, **narrow, **NEVER)
        assert len({tuple(row) for row in out.tolist()}) == 4


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, 125])
@pytest.mark.parametrize("returned", [1, 3])
def test_a_conversation_goes_on_from_the_cache(model, length, returned):
    cache = HybridCache(model.config, 6, 400)
    ids = tokens(2, length)
    options = {"num_beams": 3, "num_return_sequences": returned, "max_new_tokens": 20, **NEVER}
    for turn in range(3):
        out = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(out, model.generate(ids, **options))
        for row in range(2 * returned):
            n = int(cache.lengths[row])
            assert n >= ids.shape[1], "the prompt has not been lost"
            assert cache.text[row] == out[row, :n].tolist()
            with torch.no_grad():
                wanted = model(out[row : row + 1, : n + 1], use_cache=False).logits[:, -1]
                check = HybridCache(model.config, 6, 400)
                check.__setstate__(cache_copy(cache))
                check.reorder(torch.tensor([row]))
                found = model(out[row : row + 1, n : n + 1], past_key_values=check).logits[:, -1]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        ids = torch.cat([out[::returned], tokens(2, 5, seed=turn)], dim=1)


def cache_copy(cache):
    return copy.deepcopy(cache).__getstate__()


def test_the_next_turn_reads_little_more_than_what_is_new(model):
    cache = HybridCache(model.config, 3)
    ids, read = tokens(1, 40), []
    options = {"num_beams": 3, "max_new_tokens": 10, "past_key_values": cache, **NEVER}
    out = model.generate(ids, **options)
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape[1]))
    try:
        model.generate(torch.cat([out, tokens(1, 6)], dim=1), **options)
    finally:
        hook.remove()
    assert read[0] <= 6 + 10
    assert cache.reprocessed == 0


@pytest.mark.parametrize(("new", "held"), [(20, 130), (60, 0)])
def test_a_row_to_whose_text_the_rings_do_not_reach_back_is_emptied(new, held):
    """The best text is one that ended after two tokens; the others went on."""
    model = lively("three", sliding_window=100)
    ids = tokens(1, 130)

    def end_the_best(input_ids, scores):
        return (torch.arange(len(input_ids)) == 0) & (input_ids.shape[1] == 132)

    options = {"num_beams": 3, "max_new_tokens": new, "length_penalty": -2.0, **NEVER}
    options |= {"stopping_criteria": [end_the_best]}
    cache = HybridCache(model.config, 3, margin=28)
    out = model.generate(ids, past_key_values=cache, **options)
    assert out.shape == (1, 132)
    assert cache.lengths.tolist() == [held, 0, 0]
    assert cache.text == [out[0, :held].tolist(), [], []]
    more = torch.cat([out, tokens(1, 3)], dim=1)
    plain = {"max_new_tokens": 5, **NEVER}
    found = model.generate(more, past_key_values=cache, **plain)
    assert torch.equal(found, model.generate(more, **plain))


def test_an_interrupt_leaves_the_prompts_in_the_cache(model):
    cache = HybridCache(model.config, 6, 100)
    ids, calls = tokens(2, 20), []

    def interrupt(*unused):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    options = {"num_beams": 3, "max_new_tokens": 9, "past_key_values": cache, **NEVER}
    wanted = model.generate(ids, **{**options, "past_key_values": None})
    hook = model.model.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, **options)
    hook.remove()
    assert cache.lengths.tolist() == [20, 20, 0, 0, 0, 0]
    assert cache.text[:2] == ids.tolist()
    assert torch.equal(model.generate(ids, **options), wanted)


def test_a_cache_needs_a_row_for_each_beam(model):
    with pytest.raises(ValueError, match="the batch has 6 rows, the cache max_batch_size 2"):
        model.generate(tokens(2, 6), num_beams=3, past_key_values=HybridCache(model.config, 2))


# ---- what is refused ----------------------------------------------------------------------------


def test_tokens_cannot_be_given_before_the_search_ends(model):
    class Streamer:
        def put(self, value): ...

        def end(self): ...

    with pytest.raises(ValueError, match=r"streamer and num_beams \(2\) are both given"):
        model.generate(tokens(1, 6), num_beams=2, streamer=Streamer())
    with pytest.raises(ValueError, match="stream: num_beams is 2"):
        model.stream(tokens(1, 6), num_beams=2)


def test_logits_at_fault_are_named_with_their_prompt(model):
    def spoil(value):
        def processor(input_ids, scores):
            if input_ids.shape[1] == 8:
                scores[2:] = value
            return scores

        return [processor]

    ids = tokens(2, 6)
    for value, text in ((math.nan, "have NaN"), (-math.inf, "are -infinity everywhere")):
        with pytest.raises(ValueError, match=f"generate: prompt 1: the logits .* {text}"):
            model.generate(ids, num_beams=2, logits_processor=spoil(value), **NEVER)


def test_a_beam_without_a_continuation_is_dropped(model):
    """One text of -infinity everywhere is no fault as long as others go on."""

    def processor(input_ids, scores):
        if input_ids.shape[1] == 8:
            scores[0] = -math.inf
        return scores

    out = model.generate(
        tokens(1, 6), num_beams=3, max_new_tokens=6, logits_processor=[processor],
        return_dict_in_generate=True, **NEVER,
    )  # fmt: skip
    assert out.sequences_scores.isfinite().all()
    assert out.beam_indices[0, 2] != 0
