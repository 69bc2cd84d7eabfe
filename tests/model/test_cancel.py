"""Wherever generation is cut short, its cache holds a text that it knows, and serves any next prompt."""

from __future__ import annotations

import copy
import pickle
import random
from unittest import mock

import pytest
import torch

from gemma2 import HybridCache, ops
from tests.model.factories import lively, padded, tokens
from tests.model.recorded_graph import as_on_a_device

NEVER = {"eos_token_id": []}


class StopError(Exception):
    """An error, thrown at a moment of the test's choice."""


@pytest.fixture(scope="module")
def plain():
    return lively("three")


@pytest.fixture
def model():
    return copy.deepcopy(lively("three"))


@pytest.fixture(scope="module")
def almost():
    """A model that is mostly of the same opinion."""
    other = copy.deepcopy(lively("three"))
    torch.manual_seed(0)
    for weight in other.parameters():
        weight.data += torch.randn_like(weight) * weight.std() * 0.2
    return other


class AtTheNthCall:
    """Raises at the n-th call, then lets everything pass."""

    def __init__(self, n, error=StopError):
        self.left, self.error = n, error

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise self.error


class Streamer:
    def __init__(self, alarm):
        self.alarm = alarm

    def put(self, value):
        self.alarm()

    def end(self):
        pass


def check_text(cache, prompts, whole):
    """The cache knows its text, which is the beginning of what would have been written."""
    lengths = cache.lengths.tolist()
    if not any(lengths):
        return
    assert cache.text is not None
    assert [len(text) for text in cache.text] == lengths[: len(cache.text)]
    for text, row in zip(cache.text, whole, strict=False):
        assert text == row[: len(text)]
    assert cache.get_seq_length() >= max(lengths)


def check_any_prompt(model, cache, prompts, whole, seed):
    """The prompt again, the text so far and more, an edit, and something else."""
    draw = random.Random(seed)
    for kind in draw.sample(["again", "on", "edit", "other"], 2):
        rows = []
        for row, prompt in zip(whole, prompts, strict=True):
            fresh = tokens(1, draw.randint(1, 9), seed=draw.randint(0, 99))[0].tolist()
            at = {"again": len(prompt), "on": draw.randint(len(prompt), len(row))}.get(kind)
            at = draw.randint(1, len(prompt)) if kind == "edit" else at or 0
            rows.append(row[:at] + ([] if kind == "again" else fresh))
        ids, mask = padded([torch.tensor(row) for row in rows], "left")
        options = {"attention_mask": mask, "max_new_tokens": 6, **NEVER}
        out = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(out, model.generate(ids, **options)), kind


def batch_of(lengths, seed=0):
    rows = [tokens(1, n, seed=seed + n)[0] for n in lengths]
    ids, mask = padded(rows, "left")
    return ids, mask, [row.tolist() for row in rows]


# and at most how many calls of it there are in what is tested
PLACES = {"embedding": 9, "attention": 9, "norm": 9, "head": 3, "draw": 4, "streamer": 9}
PLACES |= {"write": 2, "rope": 9}


def alarm_at(place, model, alarm):
    """What makes the alarm ring at a place in the model's calls, to be entered."""
    modules = {
        "embedding": model.model.embed_tokens,
        "attention": model.model.layers[1].self_attn,
        "norm": model.model.norm,
        "head": model.lm_head,
    }
    if place in modules:
        return modules[place].register_forward_hook(alarm)
    operators = {"write": "cache_write", "rope": "rope_cache", "draw": "sample"}
    real = getattr(ops, operators[place])

    def ringing(*args, **kwargs):
        alarm()
        return real(*args, **kwargs)

    return mock.patch.object(ops, operators[place], ringing)


@pytest.mark.parametrize("help", ["alone", "lookup", "assistant"])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_at_any_moment_leaves_a_text_that_is_known(model, plain, almost, place, help):
    draw = random.Random(f"{place} {help}")
    rang = 0
    for case in range(3):
        lengths = draw.choice([(140,), (150, 9), (3, 170, 131)])
        ids, mask, prompts = batch_of(lengths, case)
        options = {"attention_mask": mask, "max_new_tokens": 15, **NEVER}
        written = plain.generate(ids, **options)[:, ids.shape[1] :].tolist()
        whole = [prompt + new for prompt, new in zip(prompts, written, strict=True)]
        cache = HybridCache(model.config, len(lengths), keep_snapshots=draw.randint(0, 2))
        if draw.random() < 0.5:  # there is something in it before
            plain.generate(ids[:, -3:], past_key_values=cache, max_new_tokens=140, **NEVER)
        options["prefill_chunk_size"] = None if place == "write" else draw.choice([None, 40, 130])
        options |= {
            "alone": {},
            "lookup": {"prompt_lookup_num_tokens": 3},
            "assistant": {"assistant_model": almost},
        }[help]
        alarm = AtTheNthCall(
            draw.randint(1, PLACES[place]), draw.choice([StopError, KeyboardInterrupt])
        )
        if place == "streamer":
            options["streamer"] = Streamer(alarm)
            manager = mock.patch.object(model, "training", False)
        else:
            manager = alarm_at(place, model, alarm)
        with manager:
            try:
                model.generate(ids, past_key_values=cache, **options)
            except (StopError, KeyboardInterrupt):
                rang += 1
        alarm.left = -1
        check_text(cache, prompts, whole)
        check_any_prompt(plain, cache, prompts, whole, case)
    assert rang


@pytest.mark.parametrize("help", ["alone", "lookup", "assistant"])
@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_an_error_with_steps_launched_ahead_leaves_a_text_that_is_known(plain, almost, n, help):
    """As on a device: replayed graphs, and a host that is several steps behind."""
    ids, mask, prompts = batch_of((140, 20))
    options = {"attention_mask": mask, "max_new_tokens": 15, **NEVER}
    written = plain.generate(ids, **options)[:, ids.shape[1] :].tolist()
    whole = [prompt + new for prompt, new in zip(prompts, written, strict=True)]
    cache = HybridCache(plain.config, 2, 400, keep_snapshots=1)
    options |= {
        "alone": {},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": almost},
    }[help]
    with as_on_a_device(ahead=4), pytest.raises(StopError):
        plain.generate(ids, past_key_values=cache, streamer=Streamer(AtTheNthCall(n)), **options)
    check_text(cache, prompts, whole)
    check_any_prompt(plain, cache, prompts, whole, n)


def test_an_error_of_the_drafting_model_leaves_a_text_that_is_known(model, plain):
    ids, mask, prompts = batch_of((140, 20))
    options = {"attention_mask": mask, "max_new_tokens": 15, **NEVER}
    written = plain.generate(ids, **options)[:, ids.shape[1] :].tolist()
    whole = [prompt + new for prompt, new in zip(prompts, written, strict=True)]
    for n in (1, 3, 8, 14):
        cache = HybridCache(plain.config, 2)
        earlier = {"attention_mask": mask[:, :-5], "max_new_tokens": 2, **NEVER}
        plain.generate(ids[:, :-5], past_key_values=cache, **earlier)
        with model.model.layers[0].register_forward_hook(AtTheNthCall(n)), pytest.raises(StopError):
            plain.generate(ids, past_key_values=cache, assistant_model=model, **options)
        check_any_prompt(plain, cache, prompts, whole, n)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 12])
def test_samples_that_are_cut_short_leave_the_other_rows_as_they_were(model, plain, n):
    """Two prompts are read in the first two rows, then spread over six."""
    cache = HybridCache(plain.config, 6, keep_snapshots=1)
    before = tokens(6, 150, seed=1)
    plain.generate(before, past_key_values=cache, max_new_tokens=2, **NEVER)
    ids = tokens(2, 200, seed=2)
    options = {"do_sample": True, "seed": 1, "num_return_sequences": 3, **NEVER}
    with model.model.norm.register_forward_hook(AtTheNthCall(n)), pytest.raises(StopError):
        model.generate(
            ids, past_key_values=cache, max_new_tokens=20, prefill_chunk_size=70, **options
        )
    spread = n > 3
    assert len(cache.text) == 6
    for row in range(6):
        source = ids[row // 3] if spread else (ids[row] if row < 2 else before[row])
        text, known = cache.text[row], source.tolist()
        assert text[: len(known)] == known[: len(text)]
    assert cache.lengths.tolist() == [len(text) for text in cache.text]
    out = plain.generate(ids, past_key_values=cache, max_new_tokens=5, **options)
    assert torch.equal(out, plain.generate(ids, max_new_tokens=5, **options))
    assert torch.equal(
        plain.generate(before, past_key_values=cache, max_new_tokens=5, **NEVER),
        plain.generate(before, max_new_tokens=5, **NEVER),
    )


def test_an_error_in_a_reorder_empties_the_rows_that_it_moves(plain):
    cache = HybridCache(plain.config, 3)
    plain.generate(tokens(3, 140), past_key_values=cache, max_new_tokens=3, **NEVER)
    real = torch.Tensor.index_select
    alarm = AtTheNthCall(2)

    def ringing(*args):
        alarm()
        return real(*args)

    with mock.patch.object(torch.Tensor, "index_select", ringing), pytest.raises(StopError):
        cache.reorder(torch.tensor([1, 0]))
    assert cache.lengths.tolist() == [0, 0, 142]
    ids = tokens(3, 140)
    out = plain.generate(ids, past_key_values=cache, max_new_tokens=3, **NEVER)
    assert torch.equal(out, plain.generate(ids, max_new_tokens=3, **NEVER))


@pytest.mark.parametrize("n", [1, 5, 8, 11])
def test_an_error_in_a_reorder_of_beams_leaves_no_text_of_which_nothing_is_held(plain, n):
    """Spreading the prompt over the beams comes first, at the calls 1 to 6."""
    cache, ids = HybridCache(plain.config, 3), tokens(1, 20)
    real = torch.Tensor.index_select
    alarm = AtTheNthCall(n)

    def ringing(*args):
        alarm()
        return real(*args)

    options = {"num_beams": 3, "max_new_tokens": 12, **NEVER}
    with mock.patch.object(torch.Tensor, "index_select", ringing), pytest.raises(StopError):
        plain.generate(ids, past_key_values=cache, **options)
    assert [len(text) for text in cache.text] == cache.lengths.tolist()[: len(cache.text)]
    check_any_prompt(plain, cache, ids.tolist(), plain.generate(ids, **NEVER).tolist(), n)


def test_an_error_in_going_back_empties_the_row(plain):
    cache = HybridCache(plain.config, 1, keep_snapshots=2)
    ids = tokens(1, 140)
    options = {"max_new_tokens": 140, **NEVER}
    wanted = plain.generate(ids, past_key_values=cache, **options)
    real = torch.Tensor.index_copy_
    for n in range(1, 5):
        alarm = AtTheNthCall(n)

        def ringing(*args, alarm=alarm):
            alarm()
            return real(*args)

        with mock.patch.object(torch.Tensor, "index_copy_", ringing), pytest.raises(StopError):
            plain.generate(ids, past_key_values=cache, **options)
        assert cache.text in ([[]], [ids[0, :-1].tolist()])
        assert torch.equal(plain.generate(ids, past_key_values=cache, **options), wanted)


def test_what_cannot_be_known_is_emptied(plain):
    """An interrupt while the first one is being dealt with."""
    cache = HybridCache(plain.config, 1)
    ids = tokens(1, 140)
    stream = plain.stream(ids, past_key_values=cache, max_new_tokens=9, **NEVER)
    next(stream)
    next(stream)
    with mock.patch.object(cache, "crop", AtTheNthCall(1)), pytest.raises(StopError):
        stream.close()
    assert cache.get_seq_length() == 0
    other = tokens(1, 160, seed=4)
    out = plain.generate(other, past_key_values=cache, max_new_tokens=5, **NEVER)
    assert torch.equal(out, plain.generate(other, max_new_tokens=5, **NEVER))


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_stream_that_is_dropped_leaves_the_text_that_was_given(plain, rows, steps):
    cache = HybridCache(plain.config, rows)
    ids = tokens(rows, 140)
    stream = plain.stream(ids, past_key_values=cache, max_new_tokens=9, **NEVER)
    new = [next(stream) for _ in range(steps)]
    del stream
    if steps == 0:
        assert cache.text is None
        assert cache.get_seq_length() == 0
    else:
        assert cache.text == torch.cat([ids, torch.stack(new, 1)], 1)[:, :-1].tolist()
    other = tokens(rows, 160, seed=4)
    out = plain.generate(other, past_key_values=cache, max_new_tokens=5, **NEVER)
    assert torch.equal(out, plain.generate(other, max_new_tokens=5, **NEVER))


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
@pytest.mark.parametrize("help", [{}, {"prompt_lookup_num_tokens": 3}], ids=["alone", "lookup"])
def test_another_call_ends_a_stream_that_has_not_been_dropped(plain, help, steps):
    """`for token in stream: break`, and the variable lives on."""
    cache, ids, other = HybridCache(plain.config, 1), tokens(1, 20), tokens(1, 40, seed=4)
    options = {"past_key_values": cache, "max_new_tokens": 9, **NEVER}
    stream = plain.stream(ids, **options, **help)
    given = [int(next(stream)) for _ in range(steps)]
    text = torch.cat([ids, torch.tensor([given], dtype=torch.int64)], dim=1)
    for prompt in (other, torch.cat([text, tokens(1, 3)], dim=1)):
        out = plain.generate(prompt, **options)
        assert torch.equal(out, plain.generate(prompt, max_new_tokens=9, **NEVER))
        assert cache.text == out[:, :-1].tolist()
        assert list(stream) == []
    new = plain.stream(other, **options)
    first = plain.stream(other, **options)
    assert list(new) == []
    assert torch.equal(torch.stack(list(first), 1), plain.generate(other, **options)[:, 40:])


@pytest.mark.parametrize(
    "change",
    [lambda c, _: c.reset(), lambda c, _: c.crop(5), lambda c, _: c.reorder(torch.tensor([1, 0])),
     lambda c, taken: c.restore(taken)],
    ids=["reset", "crop", "reorder", "restore"],
)  # fmt: skip
def test_what_changes_the_cache_ends_a_stream(plain, change):
    cache, ids = HybridCache(plain.config, 2), tokens(2, 20)
    options = {"past_key_values": cache, "max_new_tokens": 9, **NEVER}
    plain.generate(ids[:, :10], **{**options, "max_new_tokens": 1})
    taken = cache.snapshot()
    stream = plain.stream(ids, **options)
    next(stream), next(stream)
    change(cache, taken)
    assert list(stream) == []
    again = torch.cat([ids[:, :12], tokens(2, 9, seed=3)], dim=1)
    out = plain.generate(again, **options)
    assert torch.equal(out, plain.generate(again, max_new_tokens=9, **NEVER))
    assert pickle.loads(pickle.dumps(cache)).text == cache.text


def test_logits_at_fault_leave_the_prompt(model, plain):
    cache, ids = HybridCache(model.config, 1), tokens(1, 140)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.generate(ids, past_key_values=cache, max_new_tokens=5, **NEVER)
    assert cache.text == ids.tolist()
    check_any_prompt(plain, cache, ids.tolist(), plain.generate(ids, **NEVER).tolist(), 0)


def test_an_error_right_after_the_writes_of_a_long_chunk_empties_the_rows(plain):
    """The sliding layer has lost what the full one would still go on from."""
    before, cache = tokens(2, 200), HybridCache(plain.config, 3)
    text = plain.generate(before, past_key_values=cache, max_new_tokens=2, **NEVER)
    longer = torch.cat([text, tokens(2, 135, seed=2)], dim=1)
    real = ops.cache_write

    def ringing(*args):
        real(*args)
        raise StopError

    with mock.patch.object(ops, "cache_write", ringing), pytest.raises(StopError):
        plain.generate(longer, past_key_values=cache, max_new_tokens=2, **NEVER)
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.text == [[], []]
    options = {"max_new_tokens": 4, **NEVER}
    out = plain.generate(text, past_key_values=cache, **options)
    assert torch.equal(out, plain.generate(text, **options))
