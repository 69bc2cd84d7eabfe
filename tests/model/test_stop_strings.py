"""A text ends where it has come to contain a stop string, or where the user's criterion says so."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma2
from gemma2 import HybridCache
from gemma2.generation.stopping import StopStrings
from tests.model.factories import lively, padded, tokens
from tests.model.recorded_graph import as_on_a_device

NEVER = {"eos_token_id": []}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 11}


@pytest.fixture
def model():
    return lively("three")


class Pieces:
    """Token n has the letters of n in base 3, so that a text falls into tokens in many ways."""

    @staticmethod
    def piece(token):
        return ("abc"[token % 3] + ("abc"[token // 3 % 3] if token % 2 else ""))[: 1 + token % 2]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.piece(int(token)) for token in ids)


class Bytes:
    """Token n is the byte n of a text; two of them make a letter of the Latin-1 supplement."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(int(i) + 0x80 if int(i) % 2 else 0xC3 for i in ids).decode(errors="replace")


def first_end(new, strings, decode):
    """How many tokens it takes until the text contains one of the strings."""
    for n in range(1, len(new) + 1):
        if any(string in decode(new[:n]) for string in strings):
            return n
    return len(new)


def cut(out, columns, strings, decode, pad=0):
    """What `generate` must give, made of a text without stop strings."""
    lengths = [first_end(row[columns:].tolist(), strings, decode) for row in out]
    out = out[:, : columns + max(lengths)].clone()
    for row, length in zip(out, lengths, strict=True):
        row[columns + length :] = pad
    return out


# ---- one text -----------------------------------------------------------------------------------


@given(
    new=st.lists(st.integers(0, 17), min_size=1, max_size=40),
    strings=st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=3),
)
@settings(max_examples=200)
def test_a_token_completes_a_string_wherever_the_tokens_borders_are(new, strings):
    stop = StopStrings(strings, Pieces(), [None])
    first = first_end(new, strings, Pieces().decode)
    for n in range(1, first):
        assert not stop.complete(0, new[:n])
    if any(string in Pieces().decode(new) for string in strings):
        assert stop.complete(0, new[:first])


@pytest.mark.parametrize(
    ("string", "wanted"),
    [
        ("stop", [["st", "op"], ["stop"], ["st", "opera"], ["las", "topper"], ["s", "to", "pped"]]),
        ("\n\n", [["\n", "\n"], ["a\n", "\nb"], ["\n\n\n"]]),
        (" end", [["the", " en", "d"], ["x", " ", "ends"]]),
    ],
)
def test_strings_cross_tokens_and_end_inside_of_them(string, wanted):
    class Words:
        def decode(self, ids, skip_special_tokens=True):
            return "".join(ids)

    stop = StopStrings([string], Words(), [None])
    for text in wanted:
        assert stop.complete(0, text), text
        assert not stop.complete(0, [*text, " and on"]), "it has been complete before"
        assert not any(stop.complete(0, text[:n]) for n in range(1, len(text)))


def test_a_letter_of_several_tokens_is_whole_before_it_counts():
    stop = StopStrings(["áã"], Bytes(), [None])
    text = [2, 33, 2, 35]
    assert Bytes().decode(text) == "áã"
    assert [stop.complete(0, text[:n]) for n in range(1, 5)] == [False, False, False, True]


def test_the_prompt_is_no_new_text():
    stop = StopStrings(["ab"], Pieces(), [0])
    assert Pieces().decode([0, 4]) == "ab"
    assert not stop.complete(0, [4])
    assert stop.complete(0, [0, 4])


def test_a_long_text_is_not_decoded_again_as_a_whole():
    looked_at = []

    class Counting(Pieces):
        def decode(self, ids, skip_special_tokens=True):
            looked_at.append(len(ids))
            return super().decode(ids)

    stop = StopStrings(["abc"], Counting(), [0])
    assert stop.complete(0, [4] * 1000 + [0, 4, 8])
    assert max(looked_at) <= 12


# ---- generate -----------------------------------------------------------------------------------


STRINGS = [["cab"], ["aa", "cbc", "bbbb"], "b", ["abcabcabc"]]


@pytest.mark.parametrize("strings", STRINGS, ids=map(str, STRINGS))
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [(9,), (3, 140, 1)])
def test_rows_end_where_their_text_contains_a_string(model, lengths, sampling, strings):
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in lengths], "left")
    options = {"attention_mask": mask, "max_new_tokens": 25, **sampling, **NEVER}
    wanted = cut(
        model.generate(ids, **options), ids.shape[1], [strings] if isinstance(strings, str) else strings,
        Pieces().decode,
    )  # fmt: skip
    options |= {"stop_strings": strings, "tokenizer": Pieces()}
    helps = [{}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 4}]
    caches = []
    for help in helps:
        cache = HybridCache(model.config, len(lengths), 400)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options, **help), wanted)
        caches.append(cache)
        with as_on_a_device() as graphs:
            cache = HybridCache(model.config, len(lengths), 400)
            found = model.generate(ids, past_key_values=cache, **options, **help, cuda_graph=True)
            caches.append(cache)
        assert torch.equal(found, wanted)
        assert len(graphs) == 1
    kept = (wanted[:, ids.shape[1] :] != 0).sum(1) + mask.sum(1) - 1
    for cache in caches:
        assert cache.lengths.tolist() == kept.tolist(), "dropped tokens have been taken back"
        assert [len(row) for row in cache.text] == kept.tolist()


def test_a_conversation_goes_on_after_a_stop_with_drafts(model):
    """What stood after the stop is gone from the cache, also where the rings have wrapped."""
    text = tokens(1, 120)
    cache = HybridCache(model.config, 1, 600)
    for turn in range(5):
        options = {
            "max_new_tokens": 40,
            "stop_strings": ["cab", "bbb"],
            "tokenizer": Pieces(),
            **NEVER,
        }
        wanted = model.generate(text, **options)
        text = model.generate(
            text, past_key_values=cache, assistant_model=model, num_assistant_tokens=9, **options
        )
        assert torch.equal(text, wanted)
        text = torch.cat([text, tokens(1, 7, seed=turn)], dim=1)


@pytest.mark.parametrize("help", [{}, {"prompt_lookup_num_tokens": 4}], ids=["plain", "drafts"])
def test_streams_and_streamers_end_with_the_string(model, help):
    ids = tokens(1, 9)
    options = {"stop_strings": "cab", "tokenizer": Pieces(), "max_new_tokens": 60, **NEVER, **help}
    out = model.generate(ids, **options)
    assert out.shape[1] < 69
    assert "cab" in Pieces().decode(out[0, 9:])
    cache = HybridCache(model.config, 1)
    steps = [int(step) for step in model.stream(ids, past_key_values=cache, **options)]
    assert steps == out[0, 9:].tolist()
    assert cache.lengths.tolist() == [out.shape[1] - 1]

    class Streamer(list):
        put, end = list.append, lambda self: self.append(None)

    got = Streamer()
    model.generate(ids, streamer=got, **options)
    assert [int(token) for token in got[1:-1]] == steps


def test_scores_end_with_the_text_too(model):
    ids = tokens(2, 9)
    options = {"stop_strings": ["cab"], "tokenizer": Pieces(), "max_new_tokens": 40, **NEVER}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(ids, **options)
    drafted = model.generate(ids, **options, assistant_model=model)
    assert len(plain.scores) == len(drafted.scores) == plain.sequences.shape[1] - 9
    for a, b in zip(plain.scores, drafted.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_embeddings_are_no_text(model):
    ids = tokens(2, 9)
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"stop_strings": ["cab"], "tokenizer": Pieces(), "max_new_tokens": 30, **NEVER}
    out = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(out, model.generate(ids, **options)[:, 9:])


def test_beams_that_contain_a_string_have_ended(model):
    ids = tokens(2, 9)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 15, **NEVER}
    out = model.generate(
        ids, stop_strings=["cab", "bb"], tokenizer=Pieces(), length_penalty=-1.0,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    for row, length in zip(out.sequences.tolist(), lengths, strict=True):
        new = row[9 : 9 + length]
        assert first_end(new, ["cab", "bb"], Pieces().decode) == length
    assert min(lengths) < 15


def test_what_a_beam_decodes_of_a_long_text_does_not_begin_with_the_prompt(model):
    """The window's first token is not taken for the first one after the prompt."""
    stop = StopStrings(["abc"], Pieces(), [0])
    window = [4] * (stop.reach + 1)
    seen = []

    class Recording(Pieces):
        def decode(self, ids, skip_special_tokens=True):
            seen.append(list(ids))
            return super().decode(ids)

    model.generate(
        tokens(1, 9), num_beams=2, max_new_tokens=stop.reach + 4, stop_strings=["zzz"],
        tokenizer=Recording(), **NEVER,
    )  # fmt: skip
    assert max(map(len, seen)) == len(window), "at first the prompt's last token and all new ones"
    first = int(tokens(1, 9)[0, -1])
    steps = sum(len(ids) == len(window) and ids[0] == first for ids in seen)
    assert steps <= 4, "one step, in which the new tokens are as many as are looked at"


# ---- real tokenizers ----------------------------------------------------------------------------


@functools.cache
def embedded():
    return gemma2.tiny.load_causal_lm("float32"), gemma2.tiny.load_tokenizer()


STOPS = [[" of"], ["ing", ";"], ["s a"], ["the "], ["e"]]


@pytest.mark.parametrize("strings", STOPS, ids=map(str, STOPS))
def test_the_embedded_model_stops_where_transformers_stops(strings):
    from transformers import PreTrainedTokenizerFast, StopStringCriteria

    lm, tokenizer = embedded()
    their = PreTrainedTokenizerFast(tokenizer_file=str(gemma2.tiny.path() / "tokenizer.json"))
    batch = tokenizer([gemma2.tiny.prompt(word) for word in ("dog", "a small bird", "running")])
    options = {**batch, "max_new_tokens": 24, **NEVER}
    columns = batch["input_ids"].shape[1]
    criterion = StopStringCriteria(their, strings)
    wanted = model_with(lm, [criterion], options)
    for own in (tokenizer, their):
        out = lm.generate(stop_strings=strings, tokenizer=own, **options)
        assert torch.equal(out, wanted)
    drafted = lm.generate(
        stop_strings=strings, tokenizer=tokenizer, prompt_lookup_num_tokens=5, **options
    )
    assert torch.equal(drafted, wanted)
    assert any(
        any(string in tokenizer.decode(row[columns:]) for string in strings) for row in wanted
    )


def model_with(lm, criteria, options):
    """The text with transformers' own criterion in the place of our strings."""
    return lm.generate(stopping_criteria=criteria, **options)


# ---- the user's criteria ------------------------------------------------------------------------


def test_a_criterion_ends_rows_one_by_one_or_all_at_once(model):
    ids = tokens(3, 9)
    free = model.generate(ids, max_new_tokens=20, **NEVER)
    seen = []

    def after_a_multiple_of_7(input_ids, scores):
        seen.append(input_ids.clone())
        assert scores is None
        return input_ids[:, -1] % 7 == 0

    out = model.generate(
        ids, max_new_tokens=20, stopping_criteria=[after_a_multiple_of_7], pad_token_id=5, **NEVER
    )
    for b in range(3):
        new = free[b, 9:].tolist()
        end = next((n + 1 for n, token in enumerate(new) if token % 7 == 0), 20)
        assert out[b, 9 : 9 + end].tolist() == new[:end]
        assert (out[b, 9 + end :] == 5).all()
    for n, input_ids in enumerate(seen):
        assert torch.equal(input_ids, out[:, : 10 + n])
    out = model.generate(ids, stopping_criteria=[lambda i, s: i.shape[1] >= 13], **NEVER)
    assert torch.equal(out, free[:, :13])


def test_criteria_of_transformers_are_accepted(model):
    import transformers

    ids = tokens(2, 9)
    given = transformers.StoppingCriteriaList(
        [transformers.MaxLengthCriteria(12), transformers.MaxTimeCriteria(1e9)]
    )
    free = model.generate(ids, max_new_tokens=9, **NEVER)
    for help in ({}, {"num_beams": 2}):
        out = model.generate(ids, max_new_tokens=9, stopping_criteria=given, **help, **NEVER)
        assert out.shape == (2, 12)
    assert torch.equal(model.generate(ids, stopping_criteria=given, **NEVER), free[:, :12])


def test_a_criterion_sees_each_drafted_token(model):
    ids = tokens(1, 9)
    stop = {"stopping_criteria": [lambda i, s: i.shape[1] == 14], "max_new_tokens": 30, **NEVER}
    cache = HybridCache(model.config, 1)
    out = model.generate(ids, assistant_model=model, past_key_values=cache, **stop)
    assert torch.equal(out, model.generate(ids, max_new_tokens=5, **NEVER))
    assert cache.lengths.tolist() == [13]


def test_a_criterion_that_tells_nothing_of_the_rows_is_an_error(model):
    with pytest.raises(ValueError, match=r"stopping_criteria\[0\] gave \[3\]: it must be a bool"):
        model.generate(tokens(2, 9), stopping_criteria=[lambda i, s: torch.ones(3)], **NEVER)
    with pytest.raises(
        TypeError, match=r"stopping_criteria\[0\] gave a NoneType: it must be a bool"
    ):
        model.generate(tokens(2, 9), stopping_criteria=[lambda i, s: None], **NEVER)


@pytest.mark.parametrize("help", [{}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["stopping_criteria", "logits_processor"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_error_in_a_function_leaves_the_cache_with_a_text_it_knows(model, name, call, help):
    calls = []

    def function(input_ids, scores):
        calls.append(0)
        if len(calls) == call:
            raise LookupError("by the user")
        return False if scores is None else scores

    cache = HybridCache(model.config, 3, 300)
    ids = tokens(1, 125)
    options = {"max_new_tokens": 30, "past_key_values": cache, **help, **NEVER}
    with pytest.raises(LookupError, match="by the user"):
        model.generate(ids, **{name: [function]}, **options)
    assert int(cache.lengths[0]) >= 125
    assert len(cache.text[0]) == int(cache.lengths[0])
    wanted = model.generate(ids, **{**options, "past_key_values": None})
    assert torch.equal(model.generate(ids, **options), wanted)


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("device", [False, True])
def test_a_stream_with_strings_may_be_dropped_between_drafted_tokens(model, steps, device):
    ids = tokens(1, 125)
    cache = HybridCache(model.config, 1, 300)
    options = {"stop_strings": "zz", "tokenizer": Pieces(), "past_key_values": cache, **NEVER}
    with as_on_a_device() if device else torch.no_grad():
        stream = model.stream(ids, assistant_model=model, max_new_tokens=30, **options)
        given = [int(next(stream)) for _ in range(steps)]
        stream.close()
    assert cache.lengths.tolist() == [125 + steps - 1]
    text = torch.cat([ids, torch.tensor([given])], dim=1)
    out = model.generate(text, max_new_tokens=9, **options)
    assert torch.equal(out, model.generate(ids, max_new_tokens=steps + 9, **NEVER))
