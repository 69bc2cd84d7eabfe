"""`return_dict_in_generate`: what tokens were chosen from."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gemma2 import HybridCache
from gemma2.generation.record import Record
from gemma2.outputs import GenerateOutput
from tests.model.factories import lively, padded, tiny, tokens, twin
from tests.model.recorded_graph import as_on_a_device

NEVER = {"eos_token_id": []}
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 11}


@pytest.fixture
def model():
    return lively("three")


def assert_equal(found, wanted, exactly=True):
    assert torch.equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        ours, others = getattr(found, name), getattr(wanted, name)
        assert len(ours) == len(others)
        for a, b in zip(ours, others, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exactly else CLOSE))


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_scores_and_logits_are_those_of_transformers(model):
    ids = tokens(2, 9)
    options = {"max_new_tokens": 8, "no_repeat_ngram_size": 1, "min_new_tokens": 3, **DICT}
    options |= {"repetition_penalty": 1.3, "eos_token_id": 7, "pad_token_id": 0}
    theirs = twin(model.config, state=model.state_dict())
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    found = model.generate(ids, **options)
    assert isinstance(found, GenerateOutput)
    assert_equal(found, wanted, exactly=False)
    assert found.scores[0].isneginf().any()
    assert list(found) == ["sequences", "scores", "logits", "past_key_values"]
    for normalize in (False, True):
        ours = model.compute_transition_scores(
            found.sequences, found.scores, normalize_logits=normalize
        )
        theirs_scores = theirs.compute_transition_scores(
            wanted.sequences, wanted.scores, normalize_logits=normalize
        )
        torch.testing.assert_close(ours, theirs_scores, **CLOSE)


def test_sampled_tokens_come_from_their_scores(model):
    out = model.generate(tokens(3, 9), max_new_tokens=12, **SAMPLED, **DICT, **NEVER)
    for n, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        kept = ~scores.isneginf()
        assert (kept.sum(1) <= 20).all()
        token = out.sequences[:, 9 + n]
        assert kept[torch.arange(3), token].all()
        torch.testing.assert_close(scores[kept], logits[kept] / 1.5)
    plain = model.generate(tokens(3, 9), max_new_tokens=12, **SAMPLED, **NEVER)
    assert torch.equal(out.sequences, plain), "keeping scores draws the same numbers"


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_and_captured_steps_give_the_same(model, sampling):
    ids, mask = padded([tokens(1, 9)[0], tokens(1, 4, seed=1)[0]], "left")
    free = model.generate(ids, attention_mask=mask, max_new_tokens=20, **sampling, **NEVER)
    options = {"attention_mask": mask, "max_new_tokens": 20, **sampling, **DICT}
    options["eos_token_id"] = [int(free[0, 9 + 12])]
    wanted = model.generate(ids, **options)
    other = copy.deepcopy(model)
    other.model.norm.weight.data *= 0.7
    for help in ({}, {"assistant_model": other}, {"prompt_lookup_num_tokens": 3}):
        assert_equal(model.generate(ids, **options, **help), wanted, exactly=not help)
        with as_on_a_device() as graphs:
            found = model.generate(ids, **options, **help, cuda_graph=True)
        assert_equal(found, wanted, exactly=not help)
        assert len(graphs) == 1


def test_what_wrong_drafts_were_chosen_from_is_not_kept():
    record = Record(["scores"], 2, 6, 97, torch.device("cpu"))
    for _ in range(5):
        record.post()
        record.take([[4, -3, -3, -3, -3, -3, 0], [5, 6, -3, -3, -3, -3, 0]])
    assert sum(kept["scores"].untyped_storage().nbytes() for kept, _ in record._taken) == (
        5 * 2 * 2 * 97 * 4
    )


def test_rows_that_have_ended_have_zeros(model):
    ids = tokens(2, 6)
    free = model.generate(ids, max_new_tokens=9, **NEVER)[:, 6:]
    eos = int(free[0, 2])
    assert eos not in free[1]
    end = free[0].tolist().index(eos) + 1
    out = model.generate(ids, max_new_tokens=9, eos_token_id=eos, **DICT)
    assert len(out.scores) == 9
    assert all((scores[0] == 0).all() for scores in out.scores[end:])
    assert not any((scores[0] == 0).all() for scores in out.scores[:end])
    assert not any((scores[1] == 0).all() for scores in out.scores)


def test_the_cache_is_part_of_the_output(model):
    ids = tokens(1, 6)
    out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **NEVER)
    assert (out.scores, out.logits, out.sequences_scores, out.beam_indices) == (None,) * 4
    assert isinstance(out.past_key_values, HybridCache)
    with torch.no_grad():
        logits = model(out.sequences[:, -1:], past_key_values=out.past_key_values).logits
    more = model.generate(ids, max_new_tokens=5, **NEVER)
    assert int(logits[0, -1].argmax()) == int(more[0, -1])


@pytest.mark.parametrize("help", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_conversation_goes_on_from_the_output(model, help):
    text, cache, read = tokens(1, 40), None, []
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **help, **NEVER}
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape[1]))
    try:
        for turn in range(3):
            out = model.generate(text, past_key_values=cache, **options)
            first = read[0]
            read.clear()
            assert first <= (40 if turn == 0 else 5 + 12)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(model.model.embed_tokens, "_forward_hooks", {})
                assert torch.equal(out.sequences, model.generate(text, **options).sequences)
            text, cache = (
                torch.cat([out.sequences, tokens(1, 5, seed=turn)], 1),
                out.past_key_values,
            )
    finally:
        hook.remove()


def test_beams_record_their_logits(model):
    ids = tokens(2, 6)
    out = model.generate(ids, num_beams=3, max_new_tokens=5, **DICT, **NEVER)
    assert [tuple(logits.shape) for logits in out.logits] == [(6, 97)] * 5
    for logits, scores in zip(out.logits, out.scores, strict=True):
        torch.testing.assert_close(logits.log_softmax(-1), scores)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1].repeat_interleave(3, 0)
    torch.testing.assert_close(out.logits[0], wanted)


def test_a_bfloat16_model_gives_float32_scores():
    out = tiny("27b", dtype=torch.bfloat16).generate(
        tokens(1, 6), max_new_tokens=2, **DICT, **NEVER
    )
    assert {scores.dtype for scores in (*out.scores, *out.logits)} == {torch.float32}
    beams = tiny("27b", dtype=torch.bfloat16).generate(
        tokens(1, 6), num_beams=2, max_new_tokens=2, **DICT, **NEVER
    )
    assert beams.sequences_scores.dtype == torch.float32


def test_scores_that_nobody_gets_are_pointed_out(model):
    with pytest.warns(UserWarning, match="output_scores is True, but return_dict") as said:
        out = model.generate(tokens(1, 6), max_new_tokens=2, output_scores=True, **NEVER)
    assert isinstance(out, torch.Tensor)
    assert said[0].filename == __file__, "it points at the call"


def test_a_stream_gives_tokens_only(model):
    for name in DICT:
        with pytest.raises(ValueError, match=f"stream: {name} is True: a stream gives tokens only"):
            model.stream(tokens(1, 6), **{name: True})


def test_outputs_are_ordinary_tensors(model):
    out = model.generate(tokens(1, 6), num_beams=2, max_new_tokens=3, **DICT, **NEVER)
    for tensor in (out.sequences, out.sequences_scores, out.beam_indices, *out.scores):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    assert all(math.isfinite(score) for score in out.sequences_scores.tolist())
