"""What changes scores before a token is chosen: n-grams, minimal lengths, the user's functions."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2 import GenerationConfig, HybridCache
from gemma2.generation.processors import forbid_ngrams, penalize, warped
from tests.model.factories import lively, padded, tokens, twin
from tests.model.recorded_graph import as_on_a_device

NEVER = {"eos_token_id": []}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 11}


@pytest.fixture
def model():
    return lively("three")


@functools.cache
def theirs(shape="three"):
    return twin(lively(shape).config, state=lively(shape).state_dict())


# ---- the rules ----------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3),
    n=st.integers(1, 5),
    room=st.integers(0, 3),
)
@settings(max_examples=200)
def test_tokens_that_would_end_an_ngram_again_are_forbidden_and_no_others(rows, n, room):
    width = max(map(len, rows)) + room
    text = torch.full((len(rows), width), -1)
    for b, row in enumerate(rows):
        text[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
    known = torch.tensor([len(row) for row in rows])
    scores = torch.randn(len(rows), 5)
    found = forbid_ngrams(scores, text, known, n)
    for b, row in enumerate(rows):
        seen = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        end = row[len(row) - n + 1 :] if len(row) >= n - 1 else None
        for token in range(5):
            banned = end is not None and (*end, token) in seen
            assert found[b, token] == (-math.inf if banned else scores[b, token]), (row, n, token)


def test_what_stands_behind_the_known_tokens_is_not_looked_at():
    text = torch.tensor([[1, 2, 1, 3, 3]])
    scores = torch.zeros(1, 5)
    assert forbid_ngrams(scores, text, torch.tensor([3]), 2)[0].tolist() == [0, 0, -math.inf, 0, 0]


def test_the_penalty_is_that_of_the_operator():
    from gemma2 import reference

    text = torch.tensor([[3, 1, 1, -1], [0, -1, -1, -1]])
    scores = torch.randn(2, 5)
    scores[0, 1] = -math.inf
    wanted = reference.kept_scores(scores, text, temperature=0, repetition_penalty=1.7)
    assert torch.equal(penalize(scores, text, 1.7), wanted)


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize(
    "options",
    [(1.3, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (2.0, 0, 0.4, 0.0), (1.0, 0, 1.0, 0.3),
     (1.5, 20, 0.6, 0.1), (1.0, 1, 1e-3, 0.9)],
)  # fmt: skip
def test_filters_are_those_of_transformers(options, least):
    from transformers.generation import logits_process as their

    temperature, top_k, top_p, min_p = options
    scores = torch.randn(4, 97, generator=torch.Generator().manual_seed(1)) * 3
    warpers = [their.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(their.TopKLogitsWarper(top_k, min_tokens_to_keep=least))
    if top_p < 1:
        warpers.append(their.TopPLogitsWarper(top_p, min_tokens_to_keep=least))
    if min_p:
        warpers.append(their.MinPLogitsWarper(min_p, min_tokens_to_keep=least))
    wanted = functools.reduce(lambda x, warper: warper(None, x), warpers, scores)
    found = warped(scores, *options, least)
    assert found.dtype == torch.float32
    assert torch.equal(found.isneginf(), wanted.isneginf())
    torch.testing.assert_close(found, wanted)


# ---- the options --------------------------------------------------------------------------------


def greedy(shape, ids, eos, **options):
    """What transformers writes."""
    return theirs(shape).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=eos or 10**6,
        pad_token_id=0, **options,
    )  # fmt: skip


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_options_together_give_what_transformers_gives(data):
    shape = data.draw(st.sampled_from(["three", "single"]), "shape")
    columns, new = data.draw(st.integers(1, 12), "columns"), data.draw(st.integers(1, 20), "new")
    ids = tokens(data.draw(st.integers(1, 3), "rows"), columns, seed=data.draw(st.integers(0, 99)))
    options = {
        "max_new_tokens": new,
        "no_repeat_ngram_size": data.draw(st.integers(0, 3), "ngram"),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 0.7, 1.5]), "penalty"),
        data.draw(st.sampled_from(["min_new_tokens", "min_length"])): data.draw(
            st.integers(0, new), "least"
        ),
    }
    free = lively(shape).generate(ids, **{**options, **NEVER})[:, columns:]
    eos = data.draw(st.lists(st.sampled_from(free.flatten().tolist()), max_size=3), "eos")
    options["suppress_tokens"] = data.draw(
        st.lists(st.sampled_from(free.flatten().tolist()), max_size=2), "suppressed"
    )
    found = lively(shape).generate(ids, eos_token_id=eos, pad_token_id=0, **options)
    assert torch.equal(found, greedy(shape, ids, eos, **options))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_of_prompt_and_text_occurs_twice(model, n):
    ids, mask = padded([torch.tensor([9, 10, 11, 12]), tokens(1, 9)[0]], "left")
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=60, **NEVER)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=60, no_repeat_ngram_size=n, **NEVER
    )
    assert not torch.equal(out, plain)
    for b in range(2):
        text = [*ids[b][mask[b] == 1].tolist(), *out[b, ids.shape[1] :].tolist()]
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        assert len(set(grams)) == len(grams)


def test_rows_of_unequal_length_are_treated_as_if_alone(model):
    rows = [tokens(1, n, seed=n)[0] for n in (3, 11, 7)]
    options = {"max_new_tokens": 25, "no_repeat_ngram_size": 2, "repetition_penalty": 1.1, **NEVER}
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        out = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        for b, row in enumerate(rows):
            assert torch.equal(out[b], model.generate(row[None], **options)[0, len(row) :])


@pytest.mark.filterwarnings("ignore:.*are both given")
@pytest.mark.parametrize(
    ("least", "new"),
    [
        ({}, 1),
        ({"min_new_tokens": 5}, 6),
        ({"min_length": 11}, 6),
        ({"min_length": 6}, 1),
        ({"min_length": 20, "min_new_tokens": 3}, 4),
    ],
)
@pytest.mark.parametrize(
    "help", [{}, {"num_beams": 2, "early_stopping": True}, {"prompt_lookup_num_tokens": 3}]
)
def test_a_text_ends_no_sooner_and_no_later_than_allowed(model, help, least, new):
    """Nearly all tokens are ends, so that it ends as soon as it may."""
    ends = {"eos_token_id": list(range(3, 97)), "max_new_tokens": 12}
    options = {"repetition_penalty": 0.5, **ends, **help}
    out = model.generate(tokens(1, 6), **options, **least)[0, 6:].tolist()
    assert len(out) == new
    assert max(out[:-1], default=0) < 3 <= out[-1]


def test_a_minimal_length_of_the_call_goes_before_a_number_of_tokens_of_the_file(model):
    ends = list(range(3, 97))
    own = GenerationConfig(min_new_tokens=2, max_new_tokens=12, eos_token_id=ends)
    ids = tokens(1, 6)
    assert model.generate(ids, generation_config=own).shape == (1, 6 + 3)
    assert model.generate(ids, generation_config=own, min_length=11).shape == (1, 6 + 6)


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.5},
        {"min_new_tokens": 9, "eos_token_id": [7, 40, 41, 42, 43, 44, 45, 46]},
        {"suppress_tokens": [20, 21, 22, 60, 61, 62, 63], **SAMPLED, "top_p": 0.9},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [50], "min_length": 17, **SAMPLED},
    ],
)
@pytest.mark.parametrize("lengths", [(9,), (3, 12, 1)])
def test_they_work_in_a_captured_step_and_with_drafts(model, options, lengths):
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in lengths], "left")
    options = {"attention_mask": mask, "max_new_tokens": 22, **{**NEVER, **options}}
    wanted = model.generate(ids, **options)
    assert not torch.equal(
        wanted, model.generate(ids, attention_mask=mask, max_new_tokens=22, eos_token_id=7)
    )
    with as_on_a_device() as graphs:
        assert torch.equal(model.generate(ids, **options, cuda_graph=True), wanted)
    assert graphs[0].replays > 5
    for help in ({"assistant_model": lively("three")}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **options, **help), wanted)
        with as_on_a_device():
            assert torch.equal(model.generate(ids, **options, **help, cuda_graph=True), wanted)


def test_embeddings_have_no_tokens_to_repeat(model):
    ids = tokens(2, 8)
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": 20, "no_repeat_ngram_size": 1, "min_length": 3, **NEVER}
    out = model.generate(inputs_embeds=embeds, **options)
    assert all(len(set(row)) == 20 for row in out.tolist())
    assert torch.equal(out[:, 0], model.generate(ids, max_new_tokens=1, **NEVER)[:, -1])


def test_what_is_generated_from_a_cache_is_part_of_the_text(model):
    cache = HybridCache(model.config, 1)
    options = {"no_repeat_ngram_size": 2, "max_new_tokens": 12, **NEVER}
    ids = model.generate(tokens(1, 9), past_key_values=cache, **options)
    whole = model.generate(tokens(1, 9), **{**options, "max_new_tokens": 24})
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), whole)


def test_a_row_without_an_allowed_token_is_an_error(model):
    with pytest.raises(ValueError, match="-inf"):
        model.generate(tokens(1, 6), suppress_tokens=list(range(97)), **NEVER)
    with pytest.raises(ValueError, match="-inf"):
        model.generate(tokens(1, 6), no_repeat_ngram_size=1, max_new_tokens=97, **NEVER)


def test_the_options_of_the_generation_config_are_honoured(tmp_path, model):
    import gemma2

    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"no_repeat_ngram_size": 2, "min_length": 3, "num_beams": 3, "early_stopping": "never",'
        ' "length_penalty": 0.5, "max_new_tokens": 12, "eos_token_id": []}'
    )
    loaded = gemma2.Gemma2ForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 6)
    wanted = model.generate(
        ids, no_repeat_ngram_size=2, num_beams=3, early_stopping="never", length_penalty=0.5,
        max_new_tokens=12, **NEVER,
    )  # fmt: skip
    assert torch.equal(loaded.generate(ids), wanted)
    loaded.save_pretrained(tmp_path / "again")
    again = gemma2.GenerationConfig.from_pretrained(tmp_path / "again")
    assert again == loaded.generation_config


# ---- the user's functions -----------------------------------------------------------------------


class Watching:
    """Notes what it is given, and forbids the token that it would be without."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores.scatter(1, scores.argmax(1, keepdim=True), -math.inf)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_they_see_what_they_see_in_transformers(model, side, kind):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], side)
    options = {"attention_mask": mask, "max_new_tokens": 7, "no_repeat_ngram_size": 2}
    options |= {"greedy": {}, "sampled": SAMPLED, "beams": {"num_beams": 3}}[kind]
    ours, other = Watching(), Watching()
    out = model.generate(ids, logits_processor=[ours], **options, **NEVER)
    assert [tuple(i.shape) for i, _ in ours.seen] == [
        (6 if kind == "beams" else 2, 9 + n) for n in range(7)
    ]
    assert all(scores.dtype == torch.float32 for _, scores in ours.seen)
    if kind != "beams":
        for n, (input_ids, _) in enumerate(ours.seen):
            assert torch.equal(input_ids, out[:, : 9 + n])
    if kind == "sampled" or side == "right":
        return  # transformers draws other numbers, and goes on from padding
    import transformers

    wanted = theirs().generate(
        ids, do_sample=False, eos_token_id=10**6,
        logits_processor=transformers.LogitsProcessorList([other]), **options,
    )  # fmt: skip
    assert torch.equal(out, wanted)
    for (a, scores), (b, others) in zip(ours.seen, other.seen, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(scores, others, rtol=1e-4, atol=2e-4)


def test_processors_of_transformers_are_accepted(model):
    import transformers

    given = transformers.LogitsProcessorList(
        [
            transformers.NoRepeatNGramLogitsProcessor(2),
            transformers.MinNewTokensLengthLogitsProcessor(9, 4, [7]),
        ]
    )
    ids = tokens(2, 9)
    options = {"max_new_tokens": 15, "eos_token_id": 7}
    wanted = model.generate(ids, no_repeat_ngram_size=2, min_new_tokens=4, **options)
    assert torch.equal(model.generate(ids, logits_processor=given, **options), wanted)


def test_they_come_after_the_options_for_the_text_and_before_the_filters(model):
    ids = tokens(1, 9)
    with torch.no_grad():
        logits = model(ids).logits[:, -1].float()
    text_options = {"repetition_penalty": 1.5, "suppress_tokens": [4], "no_repeat_ngram_size": 1}
    watching = Watching()
    options = {"max_new_tokens": 1, **text_options, **NEVER}
    filters = {**SAMPLED, "temperature": 0.5, "top_k": 1}
    out = model.generate(ids, logits_processor=[watching], **options, **filters)
    scores = watching.seen[0][1]
    assert scores[0, 4] == -math.inf
    assert (scores[0, ids[0]] == -math.inf).all()
    rest = ~scores.isneginf()
    torch.testing.assert_close(scores[rest], logits[rest])
    assert int(out[0, -1]) == int(scores[0].topk(2).indices[1]), "top-k 1 of what is left"
    fn = Watching()
    model.generate(ids, logits_processor=[fn], max_new_tokens=1, repetition_penalty=1.5, **NEVER)
    torch.testing.assert_close(fn.seen[0][1], penalize(logits, ids, 1.5))


def test_they_may_change_scores_in_place_without_changing_logits(model):
    def processor(input_ids, scores):
        scores[:, 13] = 100.0
        return scores

    out = model.generate(
        tokens(2, 6), logits_processor=[processor], max_new_tokens=3, output_logits=True,
        return_dict_in_generate=True, **NEVER,
    )  # fmt: skip
    assert (out.sequences[:, 6:] == 13).all()
    assert all((logits <= 8.0).all() for logits in out.logits)


def test_they_are_called_in_turn_and_their_results_are_checked(model):
    ids = tokens(1, 6)
    first, second = (lambda i, scores: scores * 0 + 3), (lambda i, scores: scores * 2 + 1)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(ids, logits_processor=[first, second], **options, **NEVER)
    assert (out.scores[0] == 7).all()
    for result, kind, text in (
        (None, TypeError, r"logits_processor\[0\] gave a NoneType: it must give the scores"),
        (torch.zeros(1, 5), ValueError, r"logits_processor\[0\] gave scores of shape \[1, 5\]"),
    ):
        with pytest.raises(kind, match=text):
            model.generate(ids, logits_processor=[lambda i, s, r=result: r], **NEVER)


def test_what_only_python_can_do_is_not_captured(model):
    options = {"max_new_tokens": 12, "logits_processor": [Watching()], **NEVER}
    wanted = model.generate(tokens(2, 6), **options)
    with as_on_a_device() as graphs:
        assert torch.equal(model.generate(tokens(2, 6), **options), wanted)
        assert not graphs
        with pytest.raises(ValueError, match="cuda_graph is True, but there is a logits_processor"):
            model.generate(tokens(2, 6), **options, cuda_graph=True)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_with_drafts_they_see_the_text_up_to_each_token(model, sampling):
    ids = tokens(1, 9)
    options = {"max_new_tokens": 20, **sampling, **NEVER}

    def even_after_odd(input_ids, scores):
        parity = (torch.arange(97) + input_ids[:, -1:]) % 2 == 0
        return scores.masked_fill(parity, -math.inf)

    given = {"logits_processor": [even_after_odd]}
    wanted = model.generate(ids, **options, **given)
    assert ((wanted[0, 9:] + wanted[0, 8:-1]) % 2 == 1).all()
    for help in ({"assistant_model": lively("three")}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **options, **given, **help), wanted)
    with pytest.raises(ValueError, match="logits_processor and drafted tokens for 2 rows"):
        model.generate(tokens(2, 9), prompt_lookup_num_tokens=3, **options, **given)


def test_embeddings_show_them_the_new_tokens_only(model):
    watching = Watching()
    embeds = model.get_input_embeddings()(tokens(2, 5)).detach()
    out = model.generate(
        inputs_embeds=embeds, max_new_tokens=4, logits_processor=[watching], **NEVER
    )
    for n, (input_ids, _) in enumerate(watching.seen):
        assert torch.equal(input_ids, out[:, :n])


def test_rows_that_have_ended_show_pads(model):
    ids = tokens(2, 6)
    free = model.generate(ids, max_new_tokens=9, **NEVER)[:, 6:]
    eos = int(free[0, 2])
    assert eos not in free[1]
    seen = []

    def processor(input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    out = model.generate(
        ids, max_new_tokens=9, eos_token_id=eos, pad_token_id=5, logits_processor=[processor]
    )
    for n, input_ids in enumerate(seen):
        assert torch.equal(input_ids, out[:, : 6 + n])
