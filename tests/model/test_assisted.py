"""Assisted decoding writes what the model writes alone, in fewer calls."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import HybridCache
from gemma2.generation.assisted import look_up
from tests.model.factories import build, config, lively, padded, tokens
from tests.model.recorded_graph import as_on_a_device
from tests.model.test_graph import ROWS, SAMPLING

NEVER = {"eos_token_id": []}


@pytest.fixture
def model():
    return lively("three")


@pytest.fixture(scope="module")
def almost():
    """A model that is mostly of the same opinion as `model`."""
    other = copy.deepcopy(lively("three"))
    torch.manual_seed(0)
    for weight in other.parameters():
        weight.data += torch.randn_like(weight) * weight.std() * 0.2
    return other


def calls_of(model, **options):
    """The tokens, and how many columns each call of the model read."""
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape[1]))
    try:
        return model.generate(**options), read
    finally:
        hook.remove()


def drafting(kind, model, almost):
    return {
        "twin": {"assistant_model": copy.deepcopy(model)},
        "almost": {"assistant_model": almost},
        "other": {"assistant_model": lively("27b"), "num_assistant_tokens": 3},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "long lookup": {"prompt_lookup_num_tokens": 1, "max_matching_ngram_size": 5},
    }[kind]


KINDS = ["twin", "almost", "other", "lookup", "long lookup"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_the_one_without_assistance_as_on_a_device_too(
    model, almost, sampling, rows, kind
):
    side = "left" if rows == "several" else "right"
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in ROWS[rows]], side)
    options = {"attention_mask": mask, "max_new_tokens": 19, **NEVER, **SAMPLING[sampling]}
    wanted = model.generate(ids, **options)
    help = drafting(kind, model, almost)
    assert torch.equal(model.generate(ids, **options, **help), wanted)
    with as_on_a_device() as graphs:
        found = model.generate(ids, **options, **help, cuda_graph=True)
    assert torch.equal(found, wanted)
    assert len(graphs) == 1


@pytest.mark.parametrize("sampling", ["greedy", "penalty", "all", "top-p"])
def test_a_twin_drafts_what_the_model_would_draw(model, sampling):
    """The same random numbers for the same place: all drafts are right, and a call adds k + 1."""
    help = {"assistant_model": copy.deepcopy(model), "num_assistant_tokens": 4}
    options = {"max_new_tokens": 21, **NEVER, **SAMPLING[sampling], **help}
    _, read = calls_of(model, input_ids=tokens(2, 6), **options)
    assert read == [6, 5, 5, 5, 5]


def test_a_model_of_almost_the_same_opinion_saves_calls(model, almost, caplog):
    options = {"input_ids": tokens(2, 6), "max_new_tokens": 60, "assistant_model": almost}
    with caplog.at_level(logging.DEBUG, "gemma2.generation.loop"):
        out, read = calls_of(model, **options, **NEVER)
    assert torch.equal(out, model.generate(tokens(2, 6), max_new_tokens=60, **NEVER))
    assert 12 < len(read) < 50
    accepted, calls = (int(n) for n in caplog.messages[-1].split() if n.isdigit())
    assert accepted > 0
    assert accepted + calls == 2 * 59, "a call gives the drafts accepted and one token"


def test_no_more_is_drafted_than_promises_to_be_right(model):
    """The draft model is wrong in its first draft of eight, then always right."""
    draft = copy.deepcopy(model)
    calls = []

    def wrong_at_first(module, inputs, output):
        calls.append(output)
        return -output if len(calls) <= 1 + 8 else None  # the prompt, and a draft

    draft.lm_head.register_forward_hook(wrong_at_first)
    options = {"input_ids": tokens(1, 6), "max_new_tokens": 30, "num_assistant_tokens": 8, **NEVER}
    out, read = calls_of(model, assistant_model=draft, **options)
    assert torch.equal(out, model.generate(tokens(1, 6), max_new_tokens=30, **NEVER))
    assert read == [6, 9, 2, 3, 5, 9, 9]


def test_rows_that_end_at_steps_of_their_own(model, almost):
    ids = tokens(3, 6)
    free = model.generate(ids, max_new_tokens=30, **NEVER)[:, 6:]
    options = {"max_new_tokens": 30, "eos_token_id": [int(free[1, 4]), int(free[0, 13])]}
    caches = [HybridCache(model.config, 3, 64) for _ in range(3)]
    wanted = model.generate(ids, **options, past_key_values=caches[0])
    help = {"assistant_model": almost}
    assert torch.equal(model.generate(ids, **options, **help, past_key_values=caches[1]), wanted)
    with as_on_a_device(ahead=8):
        out = model.generate(ids, **options, **help, past_key_values=caches[2])
        assert caches[2].get_seq_length() == max(caches[0].lengths.tolist())
    assert torch.equal(out, wanted)
    for cache in caches[1:]:
        assert torch.equal(cache.lengths, caches[0].lengths)


@pytest.mark.parametrize("kind", ["almost", "lookup"])
def test_a_conversation_goes_on_from_a_cache_whose_rings_wrap(model, almost, kind):
    caches = [HybridCache(model.config, 2, 400) for _ in range(3)]
    texts = [tokens(2, 100)] * 3
    help = drafting(kind, model, almost)
    for turn in range(3):
        options = {"max_new_tokens": 40, **NEVER, **SAMPLING["top-k"]}
        texts[0] = model.generate(texts[0], past_key_values=caches[0], **options)
        texts[1] = model.generate(texts[1], past_key_values=caches[1], **options, **help)
        with as_on_a_device():
            texts[2] = model.generate(texts[2], past_key_values=caches[2], **options, **help)
        assert torch.equal(texts[1], texts[0])
        assert torch.equal(texts[2], texts[0])
        mask = torch.ones_like(texts[0])
        assert mask.shape[1] - 1 == caches[1].get_seq_length() == caches[2].get_seq_length()
        texts = [torch.cat([text, tokens(2, 30, seed=turn)], dim=1) for text in texts]


def test_samples_of_one_prompt(model, almost):
    options = {"num_return_sequences": 3, "max_new_tokens": 20, **SAMPLING["all"], **NEVER}
    wanted = model.generate(tokens(2, 7), **options)
    assert torch.equal(model.generate(tokens(2, 7), **options, assistant_model=almost), wanted)
    assert torch.equal(model.generate(tokens(2, 7), **options, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("new", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_texts(model, almost, new, length):
    ids = tokens(2, length)
    wanted = model.generate(ids, max_new_tokens=new, **NEVER)
    for kind in KINDS:
        help = drafting(kind, model, almost)
        assert torch.equal(model.generate(ids, max_new_tokens=new, **NEVER, **help), wanted)


def test_more_drafts_than_the_usual_margin(model):
    help = {"prompt_lookup_num_tokens": 130}
    ids = tokens(1, 140)
    wanted = model.generate(ids, max_new_tokens=250, **NEVER)
    assert torch.equal(model.generate(ids, max_new_tokens=250, **NEVER, **help), wanted)


# ---- streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("device", [False, True])
def test_a_stream_that_is_dropped_leaves_the_cache_at_the_last_token_given(model, steps, device):
    ids = tokens(1, 130)
    cache = HybridCache(model.config, 1)
    options = {"max_new_tokens": 20, "past_key_values": cache, **NEVER}
    with as_on_a_device() if device else torch.no_grad():
        stream = model.stream(ids, assistant_model=copy.deepcopy(model), **options)
        new = [int(next(stream)) for _ in range(steps)]
        stream.close()
    text = torch.cat([ids, torch.tensor([new], dtype=torch.int64)], dim=1)
    assert cache.lengths.tolist() == [130 + steps - 1 if steps else 0]
    out = model.generate(text, **{**options, "max_new_tokens": 20 - steps})
    assert torch.equal(out, model.generate(ids, max_new_tokens=20, **NEVER))


def test_a_streamer_gets_column_after_column(model, almost):
    got = []

    class Streamer:
        def put(self, value):
            got.append(value)

        def end(self):
            got.append(None)

    ids = tokens(3, 6)
    out = model.generate(
        ids, assistant_model=almost, max_new_tokens=15, streamer=Streamer(), **NEVER
    )
    assert got.pop() is None
    assert torch.equal(torch.cat([got[0], torch.stack(got[1:], 1)], 1), out)


@pytest.mark.parametrize("call", range(2, 8))
@pytest.mark.parametrize("where", ["model.layers.0", "model.norm", "lm_head"])
def test_an_interrupt_in_the_middle_of_a_step_leaves_the_cache_usable(where, call):
    model = copy.deepcopy(lively("three"))
    cache = HybridCache(model.config, 1, 300)
    ids = tokens(1, 140)
    options = {"past_key_values": cache, "prompt_lookup_num_tokens": 4, **NEVER}
    calls = []

    def interrupt(*unused):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt

    hook = model.get_submodule(where).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=30, **options)
    hook.remove()
    length = cache.get_seq_length()
    wanted = model.generate(ids, max_new_tokens=30, **NEVER)
    out = model.generate(wanted[:, : length + 1], max_new_tokens=170 - length - 1, **options)
    assert torch.equal(out, wanted)


# ---- looking up ---------------------------------------------------------------------------------


def naive(row, count, ngram):
    for n in range(min(ngram, len(row) - 1), 0, -1):
        for start in range(len(row) - n - 1, -1, -1):
            if row[start : start + n] == row[-n:]:
                drafts = row[start + n :]
                return (drafts * (count // len(drafts) + 1))[:count]
    return (row * count)[:count]


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=3),
    count=st.integers(1, 5),
    ngram=st.integers(1, 4),
)
@settings(max_examples=200)
def test_the_last_occurrence_of_the_longest_end_is_gone_on_from(rows, count, ngram):
    text = torch.full((len(rows), 14), -1)
    for b, row in enumerate(rows):
        text[b, : len(row)] = torch.tensor(row)
    known = torch.tensor([len(row) for row in rows])
    found = look_up(text, known, count, ngram).tolist()
    assert found == [naive(row, count, ngram) for row in rows]


def test_a_text_that_repeats_itself_is_drafted_whole():
    text = torch.tensor([[7, 1, 2, 3, 1, 2, 3, -1, -1, -1]])
    assert look_up(text, torch.tensor([7]), 7, 2).tolist() == [[1, 2, 3, 1, 2, 3, 1]]


# ---- what is refused ----------------------------------------------------------------------------


def test_bad_options_are_named(model, almost):
    ids = tokens(2, 6)

    def refused(text, kind=ValueError, **options):
        with pytest.raises(kind, match=text):
            model.generate(**{"input_ids": ids, **options})

    refused("assistant_model is a str: it must be a Gemma2ForC", TypeError, assistant_model="2b")
    few = build(config("three", vocab_size=50))
    refused("has a vocabulary of 50 tokens, the model of 97", assistant_model=few)
    refused("both given", assistant_model=almost, prompt_lookup_num_tokens=3)
    refused("num_assistant_tokens is 0", assistant_model=almost, num_assistant_tokens=0)
    refused("prompt_lookup_num_tokens is 0", prompt_lookup_num_tokens=0)
    refused("max_matching_ngram_size is -1", max_matching_ngram_size=-1)
    embeds = model.get_input_embeddings()(ids).detach()
    refused("inputs_embeds is given", input_ids=None, inputs_embeds=embeds, assistant_model=almost)
    small = HybridCache(model.config, 2, 20)
    refused(
        r"max_cache_len 20, but 6 tokens and 12 new ones need 23 \(of which 6 for drafted tokens\)",
        past_key_values=small, assistant_model=almost, max_new_tokens=12,
    )  # fmt: skip
    tight = HybridCache(model.config, 2, 400, margin=0)
    assert tight.margin == 120
    refused(
        "a margin of 120 tokens that can be taken back, drafts need 121",
        past_key_values=tight, prompt_lookup_num_tokens=120, max_new_tokens=12,
    )  # fmt: skip
    assert tight.nbytes == 0
    with pytest.raises(ValueError, match="stream: 2 rows and drafted tokens"):
        model.stream(ids, assistant_model=almost)
    elsewhere = copy.deepcopy(almost).to("meta")
    refused("assistant_model is on meta, the model on cpu", assistant_model=elsewhere)


def test_an_assistant_in_training_mode_drafts_without_dropout(model):
    assistant = copy.deepcopy(model).train()
    modes = []
    assistant.model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    model.generate(tokens(1, 6), assistant_model=assistant, max_new_tokens=9, **NEVER)
    assert modes
    assert not any(modes)
    assert all(module.training for module in assistant.modules())


def test_hooks_of_the_assistant_are_called_so_there_is_no_graph(model):
    assistant = copy.deepcopy(model)
    assistant.model.norm.register_forward_hook(lambda *_: None)
    with as_on_a_device(), pytest.raises(ValueError, match=r"model\.norm has hooks"):
        model.generate(tokens(1, 6), assistant_model=assistant, cuda_graph=True)
