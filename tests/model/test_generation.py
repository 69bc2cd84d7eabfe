"""What `generate` and `stream` promise."""

from __future__ import annotations

import io
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma2
from gemma2 import GenerationConfig, HybridCache, TextStreamer
from tests.model.factories import build, config, lively, padded, tokens, twin

NEVER = {"eos_token_id": []}


@pytest.fixture
def model():
    return lively("three")


def new_tokens(model, ids, count, **options):
    """The greedy continuation, int64 [B, count]."""
    return model.generate(ids, max_new_tokens=count, **{**NEVER, **options})[:, ids.shape[1] :]


def uncached(model, ids, count):
    """The same by whole forward calls: slow, and hard to get wrong."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


# ---- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["2b", "27b", "three", "single"])
def test_greedy_equals_a_loop_without_a_cache(shape):
    model = lively(shape)
    ids = tokens(2, 13)
    out = model.generate(ids, max_new_tokens=12, **NEVER)
    assert out.dtype == torch.int64
    assert torch.equal(out, uncached(model, ids, 12))


def test_greedy_equals_a_loop_without_a_cache_when_the_ring_wraps(model):
    ids = tokens(1, 125)  # the ring has 128 slots
    out = model.generate(ids, max_new_tokens=10, **NEVER)
    assert torch.equal(out, uncached(model, ids, 10))


@pytest.mark.parametrize("shape", ["2b", "27b", "three"])
def test_greedy_equals_transformers(shape):
    model = lively(shape)
    theirs = twin(model.config, state=model.state_dict())
    ids, mask = padded([tokens(1, 5)[0], tokens(1, 14, seed=1)[0]], "left")
    # a number that no token has: then nothing ends
    wanted = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=10**6
    )
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=9, **NEVER), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(3, 11), (20, 1, 9), (4, 140)])
def test_each_row_of_unequal_prompts_goes_on_as_if_alone(model, side, lengths):
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    ids, mask = padded(rows, side)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, **NEVER)
    assert torch.equal(out[:, : ids.shape[1]], ids), "the prompt stands as it was given"
    for b, row in enumerate(rows):
        assert torch.equal(out[b, ids.shape[1] :], new_tokens(model, row[None], 8)[0]), b


def test_padding_between_tokens_is_not_seen(model):
    row = tokens(1, 12)
    ids, mask = row.repeat(2, 1), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 3:6] = False
    mask[1, 8] = False
    out = new_tokens(model, ids, 6, attention_mask=mask)
    assert torch.equal(out[1], new_tokens(model, row[:, mask[1]], 6)[0])


@given(data=st.data())
@settings(max_examples=20)
def test_any_padding_chunking_and_continuation_gives_what_each_row_gives_alone(data):
    model = lively("three")
    columns = data.draw(st.integers(2, 40), "columns")
    rows = data.draw(st.integers(1, 3), "rows")
    seed = data.draw(st.integers(0, 1000), "seed")
    generator = torch.Generator().manual_seed(seed)
    density = data.draw(st.sampled_from([0.3, 0.8, 1.0]), "density")
    mask = torch.rand(rows, columns, generator=generator) < density
    mask[:, -1] |= ~mask.any(1)
    chunk = data.draw(st.sampled_from([None, 1, 5]), "chunk")
    cached = data.draw(st.integers(0, columns - 1), "columns in the cache")
    ids = tokens(rows, columns, seed=seed)
    cache = HybridCache(model.config, rows)
    if mask[:, :cached].any(1).all() and mask[:, cached:].any(1).all():
        # the first part, whose new token, not being in the cache, is forgotten
        model.generate(
            ids[:, :cached],
            attention_mask=mask[:, :cached],
            max_new_tokens=1,
            past_key_values=cache,
            **NEVER,
        )
    out = new_tokens(
        model, ids, 4, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk
    )
    for b in range(rows):
        alone = uncached(model, ids[b : b + 1, mask[b]], 4)[0, -4:]
        assert torch.equal(out[b], alone), f"row {b}"


def test_content_of_padding_does_not_matter_even_outside_the_vocabulary(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "left")
    strange = ids.masked_fill(mask == 0, -100)
    assert torch.equal(
        new_tokens(model, strange, 5, attention_mask=mask),
        new_tokens(model, ids, 5, attention_mask=mask),
    )


@pytest.mark.parametrize("chunk", [1, 3, 64, 65, 66, 100, 199])
def test_a_prompt_read_in_chunks_gives_the_same_text(model, chunk):
    ids, mask = padded([tokens(1, 200)[0], tokens(1, 70, seed=1)[0]], "left")
    whole = new_tokens(model, ids, 6, attention_mask=mask)
    assert torch.equal(
        new_tokens(model, ids, 6, attention_mask=mask, prefill_chunk_size=chunk), whole
    )


def test_every_token_is_read_once_and_only_last_logits_are_computed(model):
    read, headed = [], []
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape[1])),
        model.lm_head.register_forward_hook(lambda m, i, o: headed.append(tuple(o.shape[:2]))),
    ]
    try:
        model.generate(tokens(2, 30), max_new_tokens=5, prefill_chunk_size=16, **NEVER)
    finally:
        for hook in hooks:
            hook.remove()
    assert read == [16, 14, 1, 1, 1, 1]
    assert headed == [(2, 1)] * 5


def test_inputs_embeds_continue_like_their_ids_and_give_the_new_tokens_only(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "right")
    embeds = model.get_input_embeddings()(ids).detach()
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=7, **NEVER)
    assert torch.equal(out, new_tokens(model, ids, 7, attention_mask=mask))


def test_inputs_embeds_take_all_options_that_ids_take(model):
    embeds = model.get_input_embeddings()(tokens(2, 5)).detach()
    out = model.generate(
        inputs_embeds=embeds, max_length=6, repetition_penalty=1e6, num_return_sequences=2, **WILD
    )
    assert out.shape == (4, 6)
    assert all(len(set(row)) == 6 for row in out.tolist()), "nothing is repeated"


def test_without_a_prompt_a_text_begins_with_bos(model):
    bos = torch.tensor([[model.config.bos_token_id]])
    assert torch.equal(
        model.generate(max_new_tokens=4, **NEVER), model.generate(bos, max_new_tokens=4, **NEVER)
    )


# ---- where it ends ------------------------------------------------------------------------------


def test_a_row_ends_at_its_first_eos_and_is_padded(model):
    ids = tokens(3, 6)
    free = new_tokens(model, ids, 12)
    eos = int(free[1, 3])
    out = new_tokens(model, ids, 12, eos_token_id=eos, pad_token_id=5)
    for b in range(3):
        ends = (free[b] == eos).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else 12
        assert torch.equal(out[b, :stop], free[b, :stop])
        assert (out[b, stop:] == 5).all()


def test_any_of_several_ends_of_text_ends_a_row(model):
    ids = tokens(1, 6)
    free = new_tokens(model, ids, 12)[0].tolist()
    for ends in ([free[7], free[4]], (free[4],), torch.tensor([free[4], 96])):
        out = new_tokens(model, ids, 12, eos_token_id=ends)[0].tolist()
        first = min(free.index(int(end)) for end in ends if int(end) in free)
        assert out == free[: first + 1]


def test_generation_stops_when_all_rows_have_ended(model):
    ids = tokens(1, 6)
    token = int(new_tokens(model, ids, 1)[0, 0])
    out = model.generate(ids.repeat(2, 1), max_new_tokens=50, eos_token_id=token)
    assert out.shape == (2, 7)


def test_a_row_that_has_ended_is_no_longer_written_to_the_cache(model):
    rows = [tokens(1, 6, seed=s) for s in range(2)]
    ids = torch.cat(rows)
    free = new_tokens(model, ids, 9)
    eos = int(free[0, 2])
    assert eos not in free[1]
    first = (free[0] == eos).nonzero()[0, 0]
    cache = HybridCache(model.config, 2, 64)
    out = new_tokens(model, ids, 9, eos_token_id=eos, past_key_values=cache)
    assert torch.equal(out[1], free[1])
    assert cache.lengths.tolist() == [6 + int(first), 6 + 8]


def test_lengths_count_new_tokens_or_all_columns(model):
    ids = tokens(1, 6)
    assert model.generate(ids, **NEVER).shape == (1, 26)
    assert model.generate(ids, max_length=10, **NEVER).shape == (1, 10)
    with pytest.warns(UserWarning, match="are both given: max_new_tokens counts"):
        assert model.generate(ids, max_length=10, max_new_tokens=2, **NEVER).shape == (1, 8)
    own = GenerationConfig(max_new_tokens=3, eos_token_id=[])
    assert model.generate(ids, generation_config=own).shape == (1, 9)
    assert model.generate(ids, generation_config=own, max_length=20).shape == (1, 20)


# ---- padding without a mask ---------------------------------------------------------------------


def test_pads_without_a_mask_are_padding_and_that_is_said(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "left")
    with pytest.warns(UserWarning, match="pad_token_id \\(0\\) and no attention_mask") as said:
        out = model.generate(ids, max_new_tokens=5, **NEVER)[:, 9:]
    assert said[0].filename == __file__, "it points at the call"
    assert torch.equal(out, new_tokens(model, ids, 5, attention_mask=mask))


def test_a_pad_that_ends_texts_too_is_a_token_like_any_other(model):
    ids = tokens(1, 5)
    ids[0, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(ids, max_new_tokens=1, eos_token_id=1, pad_token_id=1)
    assert torch.equal(out, uncached(model, ids, 1))


# ---- sampling -----------------------------------------------------------------------------------

WILD = {"do_sample": True, "temperature": 3.0, "top_k": 0, **NEVER}


def test_a_seed_reproduces_a_text_and_another_one_does_not(model):
    ids = tokens(2, 6)
    texts = [new_tokens(model, ids, 20, seed=seed, **WILD) for seed in (1, 1, 2, 2**63 - 1)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[3])
    assert not torch.equal(texts[0][0], texts[0][1]), "rows draw numbers of their own"


def test_without_a_seed_torch_manual_seed_decides(model):
    ids = tokens(1, 6)

    def draw(seed):
        torch.manual_seed(seed)
        return new_tokens(model, ids, 20, **WILD)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    torch.manual_seed(3)
    assert not torch.equal(new_tokens(model, ids, 20, **WILD), new_tokens(model, ids, 20, **WILD))


def test_greedy_takes_no_random_numbers(model):
    before = torch.get_rng_state()
    new_tokens(model, tokens(1, 6), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}]
)
def test_the_narrowest_choice_is_greedy(model, options):
    ids = tokens(2, 6)
    out = new_tokens(model, ids, 10, do_sample=True, seed=5, **options)
    assert torch.equal(out, new_tokens(model, ids, 10))


def test_top_k_larger_than_the_vocabulary_keeps_everything(model):
    ids = tokens(1, 6)
    few = {**WILD, "seed": 1}
    assert torch.equal(
        new_tokens(model, ids, 10, **{**few, "top_k": 10**9}), new_tokens(model, ids, 10, **few)
    )


def test_sampling_options_without_sampling_are_pointed_out(model):
    ids = tokens(1, 6)
    with pytest.warns(UserWarning, match="temperature, top_p given, but do_sample") as said:
        out = model.generate(ids, max_new_tokens=3, temperature=0.7, top_p=0.9, **NEVER)
    assert said[0].filename == __file__, "it points at the call"
    assert torch.equal(out[:, 6:], new_tokens(model, ids, 3))
    with pytest.warns(UserWarning, match="top_k given") as said:
        model.stream(ids, top_k=3)
    assert said[0].filename == __file__


def test_options_that_have_nothing_to_work_on_are_pointed_out(model):
    ids = tokens(1, 6)
    with pytest.warns(UserWarning, match="length_penalty, early_stopping given, but num") as said:
        model.generate(ids, max_new_tokens=2, length_penalty=2.0, early_stopping=True)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="min_new_tokens is 5, but there are at most 2"):
        model.generate(ids, max_new_tokens=2, min_new_tokens=5)
    for options, text in (
        ({"max_length": 9}, "max_new_tokens and max_length are both given: max_new_tokens counts"),
        ({"min_length": 7, "min_new_tokens": 1}, "min_new_tokens and min_length are both given"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens given, but there is no assistant_m"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size given, but prompt_lookup"),
    ):
        with pytest.warns(UserWarning, match=text):
            model.generate(ids, max_new_tokens=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=2, length_penalty=1.0, early_stopping=False)


def test_a_high_repetition_penalty_repeats_nothing_of_prompt_and_text(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "right")
    out = new_tokens(model, ids, 30, attention_mask=mask, repetition_penalty=1e6)
    for b in range(2):
        seen = [*ids[b][mask[b] == 1].tolist()]
        for step, token in enumerate(out[b].tolist()):
            assert token not in seen, f"row {b}, step {step}"
            seen.append(token)


def test_repetition_penalty_equals_transformers():
    model = lively("27b")
    theirs = twin(model.config, state=model.state_dict())
    ids = tokens(2, 9)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.7}
    wanted = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=10**6, **options
    )
    assert torch.equal(model.generate(ids, **options, **NEVER), wanted)


def test_several_sequences_a_prompt_read_the_prompt_once(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "left")
    rows = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: rows.append(o.shape[:2]))
    try:
        out = new_tokens(model, ids, 6, attention_mask=mask, num_return_sequences=3, seed=7, **WILD)
    finally:
        hook.remove()
    assert [tuple(r) for r in rows] == [(2, 9), *[(6, 1)] * 5]
    repeated = (t.repeat_interleave(3, dim=0) for t in (ids, mask))
    again = dict(zip(("ids", "mask"), repeated, strict=True))
    wanted = new_tokens(model, again["ids"], 6, attention_mask=again["mask"], seed=7, **WILD)
    assert torch.equal(out, wanted)


# ---- streaming ----------------------------------------------------------------------------------


def test_the_stream_is_what_generate_gives(model):
    ids, mask = padded([tokens(1, 4)[0], tokens(1, 9)[0]], "right")
    eos = int(new_tokens(model, ids, 4, attention_mask=mask)[0, 2])
    options = {"attention_mask": mask, "max_new_tokens": 9, "eos_token_id": eos}
    steps = list(model.stream(ids, **options))
    assert all(step.shape == (2,) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.stack(steps, 1), model.generate(ids, **options)[:, ids.shape[1] :])
    sampled = {**options, **WILD, "seed": 3}
    assert torch.equal(
        torch.stack(list(model.stream(ids, **sampled)), 1),
        model.generate(ids, **sampled)[:, ids.shape[1] :],
    )


def test_what_the_reader_does_with_tokens_does_not_change_the_text(model):
    ids = tokens(1, 6)
    given = []
    for step in model.stream(ids, max_new_tokens=6, **NEVER):
        given.append(int(step))
        step.zero_()
    assert given == new_tokens(model, ids, 6)[0].tolist()


def test_between_steps_gradients_are_as_the_caller_has_them(model):
    for step in model.stream(tokens(1, 6), max_new_tokens=2, **NEVER):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not step.is_inference()


def test_options_are_checked_before_the_first_token_is_asked_for(model):
    with pytest.raises(ValueError, match="top_p is 2"):
        model.stream(tokens(1, 6), top_p=2)
    with pytest.raises(TypeError, match="unknown option 'streamer'"):
        model.stream(tokens(1, 6), streamer=None)


class Recorder:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value)

    def end(self):
        self.got.append("end")


def test_a_streamer_gets_the_prompt_then_each_step_then_the_end(model):
    ids = tokens(2, 6)
    recorder = Recorder()
    out = model.generate(ids, max_new_tokens=4, streamer=recorder, **NEVER)
    assert recorder.got[-1] == "end"
    assert torch.equal(recorder.got[0], ids)
    assert torch.equal(torch.stack(recorder.got[1:-1], dim=1), out[:, 6:])


def test_a_streamer_is_told_the_end_when_generation_is_cut_short(model):
    class Impatient(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 3:
                raise KeyboardInterrupt

    recorder = Impatient()
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens(1, 6), max_new_tokens=9, streamer=recorder, **NEVER)
    assert recorder.got[-1] == "end"


def test_streamers_of_transformers_work(model):
    transformers = pytest.importorskip("transformers")
    ids = tokens(1, 6)
    streamer = transformers.TextIteratorStreamer(Letters(), skip_prompt=True)
    out = model.generate(ids, max_new_tokens=4, streamer=streamer, **NEVER)
    assert "".join(streamer) == Letters().decode(out[0, 6:].tolist())


class Letters:
    """A tokenizer whose token n is the byte n of a text in which letters have two bytes."""

    def decode(self, ids, skip_special_tokens=True, **unused):
        return bytes(int(i) + 0x80 if int(i) % 2 else 0xC3 for i in ids).decode(errors="replace")


def test_text_streamer_prints_whole_characters_only():
    file = io.StringIO()
    streamer = TextStreamer(Letters(), skip_prompt=True, file=file)
    seen = []
    streamer.put(torch.tensor([[2, 1]]))
    for token in (2, 33, 2, 35, 2):
        streamer.put(torch.tensor([token]))
        seen.append(file.getvalue())
    streamer.end()
    assert seen == ["", "á", "á", "áã", "áã"]
    assert file.getvalue() == "áã\N{REPLACEMENT CHARACTER}\n"


def test_text_streamer_prints_the_prompt_unless_told_not_to_and_can_be_used_again():
    file = io.StringIO()
    streamer = TextStreamer(Letters(), file=file)
    for _ in range(2):
        streamer.put(torch.tensor([[2, 33]]))
        streamer.put(torch.tensor([2]))
        streamer.put(torch.tensor([35]))
        streamer.end()
    assert file.getvalue() == "áã\náã\n"


def test_text_streamer_refuses_a_batch():
    with pytest.raises(ValueError, match="the batch has 2 rows: only one text"):
        TextStreamer(Letters()).put(torch.tensor([[1], [2]]))


# ---- continuing from a cache --------------------------------------------------------------------


def test_a_conversation_goes_on_from_the_cache_and_reads_only_what_is_new(model):
    cache = HybridCache(model.config, 1)
    text = tokens(1, 20)
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: read.append(o.shape[1]))
    try:
        for turn in range(4):
            text = model.generate(text, max_new_tokens=15, past_key_values=cache, **NEVER)
            assert cache.get_seq_length() == text.shape[1] - 1
            text = torch.cat([text, tokens(1, 30, seed=turn)], dim=1)
    finally:
        hook.remove()
    assert sum(read) == cache.get_seq_length(), "nothing has been read twice"
    plain = tokens(1, 20)
    for turn in range(4):
        plain = model.generate(plain, max_new_tokens=15, **NEVER)
        plain = torch.cat([plain, tokens(1, 30, seed=turn)], dim=1)
    assert torch.equal(text, plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_rows_of_unequal_length_go_on_from_the_cache(model, side, chunk):
    rows = [tokens(1, n, seed=n)[0] for n in (3, 11)]
    ids, mask = padded(rows, side)
    free = new_tokens(model, ids, 6, attention_mask=mask)
    eos = int(free[0, 3])
    assert eos not in free[1]
    cache = HybridCache(model.config, 2, 64)
    options = {"eos_token_id": eos, "past_key_values": cache, "prefill_chunk_size": chunk}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
    more, more_mask = padded([tokens(1, n, seed=20 + n)[0] for n in (5, 2)], side)
    text = torch.cat([out, more], dim=1)
    ended = out[:, ids.shape[1] :] == 0
    text_mask = torch.cat([mask, (~ended).long(), more_mask], dim=1)
    out = model.generate(text, attention_mask=text_mask, max_new_tokens=6, **options)
    for b in range(2):
        alone = text[b : b + 1, text_mask[b] == 1]
        wanted = new_tokens(model, alone, 6, eos_token_id=eos)[0]
        assert torch.equal(out[b, text.shape[1] :][: len(wanted)], wanted), b


def test_a_given_cache_may_have_more_rows(model):
    ids = tokens(2, 9)
    cache = HybridCache(model.config, 5, 64)
    out = new_tokens(model, ids, 5, past_key_values=cache)
    assert torch.equal(out, new_tokens(model, ids, 5))
    assert cache.lengths.tolist() == [13, 13, 0, 0, 0]


def test_too_small_a_cache_is_refused_before_anything_is_run(model):
    ids = tokens(1, 9)
    cache = HybridCache(model.config, 1, 12)
    with pytest.raises(ValueError, match=r"max_cache_len 12, but 9 tokens and 5 new ones need 13"):
        model.generate(ids, max_new_tokens=5, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert new_tokens(model, ids, 4, past_key_values=cache).shape == (1, 4)


def test_a_growing_cache_grows_at_once(model):
    cache = HybridCache(model.config, 1)
    new_tokens(model, tokens(1, 9), 200, past_key_values=cache)
    assert cache.max_cache_len == 208


def test_the_cache_can_be_used_by_hand_afterwards(model):
    ids = tokens(1, 9)
    cache = HybridCache(model.config, 1, 64)
    text = model.generate(ids, max_new_tokens=5, past_key_values=cache, **NEVER)
    with torch.no_grad():
        logits = model(text[:, -1:], past_key_values=cache).logits[:, -1]
    assert torch.equal(logits.argmax(-1), uncached(model, text, 1)[:, -1])


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_stream_that_is_dropped_leaves_the_cache_usable(model, steps):
    ids = tokens(1, 9)
    cache = HybridCache(model.config, 1)
    stream = model.stream(ids, max_new_tokens=20, past_key_values=cache, **NEVER)
    given = [int(next(stream)) for _ in range(steps)]
    stream.close()
    text = torch.cat([ids, torch.tensor([given], dtype=torch.int64)], dim=1)
    assert cache.get_seq_length() == (9 + steps - 1 if steps else 0)
    out = model.generate(text, max_new_tokens=20 - steps, past_key_values=cache, **NEVER)
    assert torch.equal(out, model.generate(ids, max_new_tokens=20, **NEVER))


@pytest.mark.parametrize("call", [0, 1, 2, 4])
@pytest.mark.parametrize("layer", [0, -1])
def test_an_interrupt_in_the_middle_of_a_step_leaves_the_cache_usable(layer, call):
    model = build(config("27b"))
    cache = HybridCache(model.config, 1, 600)
    text = model.generate(tokens(1, 150), max_new_tokens=3, past_key_values=cache, **NEVER)
    before = text
    text = torch.cat([text, tokens(1, 200, seed=1)], dim=1)
    calls = []

    def interrupt(*unused):
        calls.append(0)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].register_forward_hook(interrupt)
    # chunks longer than the margin, the last one and single tokens are interrupted in turn
    options = {"max_new_tokens": 5, "past_key_values": cache, "prefill_chunk_size": 80, **NEVER}
    with pytest.raises(KeyboardInterrupt):
        model.generate(text, **options)
    hook.remove()
    assert before.shape[1] - 1 <= cache.get_seq_length() < text.shape[1] + 4
    cache.crop(min(cache.get_seq_length(), text.shape[1] - 1))
    assert torch.equal(
        model.generate(text, **options), model.generate(text, max_new_tokens=5, **NEVER)
    )


# ---- the model is left as it was ----------------------------------------------------------------


def test_training_mode_is_kept_module_by_module_and_does_not_matter():
    model = build(config("three"))
    wanted = new_tokens(model, tokens(1, 6), 4)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.gradient_checkpointing_enable()
    assert torch.equal(new_tokens(model, tokens(1, 6), 4), wanted)
    assert [module.training for module in model.modules()] == before


def test_the_output_is_an_ordinary_tensor_without_gradient(model):
    out = model.generate(tokens(1, 6), max_new_tokens=2)
    assert not out.is_inference()
    assert not out.requires_grad
    out[0, 0] = 1  # an inference tensor would refuse this in a graph


# ---- generation_config.json ---------------------------------------------------------------------


def test_the_folder_s_generation_config_is_honoured_and_saved(tmp_path, model):
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    values = {
        "_from_model_config": True,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 7],
        "max_new_tokens": 4,
        "do_sample": True,
        "top_k": 1,
        "temperature": None,
    }
    file.write_text(json.dumps(values))
    loaded = gemma2.Gemma2ForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_ids == [1, 7]
    assert loaded.generation_config.pad_token_id == 0, "from config.json"
    ids = tokens(1, 6)
    out = loaded.generate(ids, eos_token_id=[])
    assert torch.equal(out, model.generate(ids, max_new_tokens=4, **NEVER)), "top_k 1 is greedy"
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again == {k: v for k, v in values.items() if v is not None} | {"pad_token_id": 0}


def test_transformers_reads_the_generation_config_that_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(config("three"))
    model.generation_config = GenerationConfig(
        do_sample=True, top_p=0.5, max_new_tokens=9, eos_token_id=[1, 3]
    )
    model.save_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.top_p, theirs.max_new_tokens, theirs.eos_token_id) == (0.5, 9, [1, 3])
    theirs.save_pretrained(tmp_path)
    ours = GenerationConfig.from_pretrained(tmp_path)
    assert (ours.top_p, ours.max_new_tokens, ours.eos_token_id) == (0.5, 9, [1, 3])


def test_a_folder_without_a_generation_config_takes_the_ids_of_its_config(tmp_path, model):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = gemma2.Gemma2ForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config == GenerationConfig(
        bos_token_id=2, eos_token_id=1, pad_token_id=0
    )


def test_an_option_of_the_file_that_is_not_supported_is_an_error_only_when_text_is_wanted(
    tmp_path, model
):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_beam_groups": 4, "typical_p": 1.0}')
    loaded = gemma2.Gemma2ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_beam_groups is 4 \(from the generation"):
        loaded.generate(tokens(1, 6))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not readable as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"top_p": 3}', "top_p is 3.0: it must be a number in (0, 1]"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
    ],
)
def test_a_bad_generation_config_is_named_with_its_path(tmp_path, content, text):
    file = tmp_path / "generation_config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json") as error:
        GenerationConfig.from_pretrained(tmp_path)
    assert text in str(error.value)
    assert str(file) in str(error.value)


# ---- what is refused ----------------------------------------------------------------------------

BAD = [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0: it must be an int of at least 1"),
    ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is 1.5"),
    ({"max_new_tokens": True}, TypeError, "max_new_tokens is True"),
    ({"max_length": 6}, ValueError, "max_length is 6, the prompt has 6 columns already"),
    ({"do_sample": 1}, TypeError, "do_sample is 1: it must be a bool"),
    ({"temperature": -0.5}, ValueError, "temperature is -0.5: it must be a number from 1e-30 to"),
    ({"temperature": 1e-40}, ValueError, "temperature is 1e-40: it must be a number from 1e-30 to"),
    (
        {"temperature": 1e-5, "do_sample": True, "num_beams": 2},
        ValueError,
        "temperature is 1e-05 and num_beams 2: with beams it must be at least 0.0001, or 0",
    ),
    ({"temperature": float("nan")}, ValueError, "temperature is nan"),
    ({"temperature": "hot"}, TypeError, "temperature is 'hot'"),
    ({"top_k": -1}, ValueError, "top_k is -1: it must be an int of at least 0"),
    ({"top_k": 2.0}, TypeError, "top_k is 2.0"),
    ({"top_p": 0}, ValueError, "top_p is 0.0: it must be a number in (0, 1]"),
    ({"top_p": 1.01}, ValueError, "top_p is 1.01"),
    ({"min_p": 2}, ValueError, "min_p is 2.0: it must be a number in [0, 1]"),
    (
        {"repetition_penalty": 0},
        ValueError,
        "repetition_penalty is 0: it must be a number from 1e-30 to 1e+30",
    ),
    ({"max_length": int(1e30)}, ValueError, "or None, and at most 2147483647"),
    ({"no_repeat_ngram_size": 2**40}, ValueError, "no_repeat_ngram_size is 1099511627776: it must"),
    (
        {"repetition_penalty": 1e40, "no_repeat_ngram_size": 2},
        ValueError,
        "repetition_penalty is 1e+40: it must",
    ),
    ({"repetition_penalty": float("inf")}, ValueError, "repetition_penalty is inf"),
    ({"num_return_sequences": 2}, ValueError, "do_sample is False: greedy texts would all be the"),
    (
        {"num_return_sequences": 2, "do_sample": True, "temperature": 0},
        ValueError,
        "num_return_sequences is 2 and temperature is 0: greedy texts would all be the same",
    ),
    ({"eos_token_id": 97}, ValueError, "eos_token_id is 97: the vocabulary has 97 tokens"),
    ({"eos_token_id": [1, -1]}, ValueError, "eos_token_id is -1"),
    ({"eos_token_id": "end"}, TypeError, "eos_token_id is 'end'"),
    ({"pad_token_id": 1000}, ValueError, "pad_token_id is 1000: the vocabulary has 97 tokens"),
    ({"seed": -1}, ValueError, "seed is -1: it must be an int in [0, 2**63)"),
    ({"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
    ({"seed": 0.5}, TypeError, "seed is 0.5"),
    ({"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size is 0"),
    (
        {"num_beam_groups": 4},
        ValueError,
        "num_beam_groups is 4 (in the call): this option is not supported yet",
    ),
    ({"assistant_model": object()}, TypeError, "assistant_model is a object: it must be a Gemma2"),
    ({"num_beams": 0}, ValueError, "num_beams is 0: it must be an int of at least 1"),
    ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "only as many texts as beams"),
    ({"num_beams": 2, "length_penalty": "long"}, TypeError, "length_penalty is 'long'"),
    ({"num_beams": 2, "length_penalty": 1e3}, ValueError, "20 ** 1000.0 is out of range"),
    (
        {"num_beams": 2, "early_stopping": "always"},
        ValueError,
        "early_stopping is 'always': it must",
    ),
    ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, ValueError, "for one text a row"),
    ({"num_beams": 2, "cuda_graph": True}, ValueError, "cuda_graph is True, but"),
    ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size is -1"),
    ({"min_new_tokens": 1.5}, TypeError, "min_new_tokens is 1.5"),
    ({"min_length": -2}, ValueError, "min_length is -2: it must be an int of at least 0"),
    ({"suppress_tokens": [97]}, ValueError, "suppress_tokens is 97: the vocabulary has 97 tokens"),
    ({"suppress_tokens": ["a"]}, TypeError, "suppress_tokens is 'a'"),
    ({"stop_strings": "."}, ValueError, "stop_strings is ['.'], but there is no tokenizer: pass"),
    ({"stop_strings": ["."], "tokenizer": "t"}, TypeError, "tokenizer is a str: it must have"),
    ({"stop_strings": [""]}, ValueError, "stop_strings is ['']: it must be a string that is not"),
    ({"stop_strings": [3]}, TypeError, "stop_strings is [3]"),
    ({"stop_strings": 3}, TypeError, "stop_strings is 3: it must be a string"),
    ({"logits_processor": print}, TypeError, "logits_processor is a builtin_function_or_method"),
    ({"logits_processor": [3]}, TypeError, "logits_processor[0] is a int: it must be a function"),
    ({"stopping_criteria": {}}, TypeError, "stopping_criteria is a dict: it must be a list"),
    ({"return_dict_in_generate": 1}, TypeError, "return_dict_in_generate is 1: it must be a bool"),
    (
        {"output_attentions": True},
        ValueError,
        "output_attentions is True (in the call): this option",
    ),
    ({"use_cache": False}, ValueError, "use_cache is False"),
    ({"temprature": 1.0}, TypeError, "unknown option 'temprature': did you mean temperature?"),
    ({"max_tokens": 3}, TypeError, "unknown option 'max_tokens': did you mean"),
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list: it must be a tensor"),
    ({"input_ids": torch.ones(1, 2)}, TypeError, "input_ids is torch.float32: it must be int64"),
    ({"input_ids": torch.tensor([3, 4])}, ValueError, "input_ids[None] makes one row of it"),
    ({"input_ids": tokens(1, 6)[:, :0]}, ValueError, "has shape [1, 0]: at least one row and one"),
    ({"input_ids": tokens(1, 6)[:0]}, ValueError, "has shape [0, 6]"),
    ({"input_ids": torch.tensor([[5, 97]])}, ValueError, "input_ids[0, 1] is 97: the vocabulary"),
    ({"input_ids": torch.tensor([[-1, 7]])}, ValueError, "input_ids[0, 0] is -1"),
    ({"attention_mask": torch.ones(1, 5)}, ValueError, "has shape [1, 5]: it must be [1, 6]"),
    ({"attention_mask": torch.ones(1, 1, 6, 6)}, ValueError, "must be [1, 6] like the prompt"),
    ({"attention_mask": torch.full((1, 6), 2)}, ValueError, "other values than 1 for a token"),
    ({"attention_mask": torch.zeros(1, 6)}, ValueError, "row 0 has no token, only padding"),
    ({"attention_mask": [1] * 6}, TypeError, "attention_mask is a list"),
    ({"inputs_embeds": torch.ones(1, 6, 40)}, ValueError, "are both given"),
    (
        {"input_ids": None, "inputs_embeds": torch.ones(1, 6)},
        ValueError,
        "must be [rows, tokens, 40]",
    ),
    ({"past_key_values": ()}, TypeError, "past_key_values is a tuple: it must be a HybridCache"),
    ({"generation_config": {"top_k": 3}}, TypeError, "it must be a gemma2.GenerationConfig"),
    ({"streamer": print}, TypeError, "it must have put() and end()"),
    ({"input_ids": tokens(1, 6).to("meta")}, ValueError, "input_ids is on meta, the model on cpu"),
]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    BAD,
    ids=[f"{i}-{next(iter(o))}" for i, (o, _, _) in enumerate(BAD)],
)
def test_bad_options_are_named_and_nothing_is_run(model, options, kind, text):
    def fail(*unused):
        raise AssertionError("the model has been run")

    hook = model.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(kind, match="generate: ") as error:
            model.generate(**{"input_ids": tokens(1, 6), **options})
    finally:
        hook.remove()
    assert text in str(error.value)


def test_options_of_transformers_at_their_neutral_values_are_accepted(model):
    ids = tokens(1, 6)
    out = new_tokens(
        model, ids, 3, num_beams=1, num_return_sequences=1, use_cache=True, typical_p=1.0,
        return_dict_in_generate=False, output_scores=None, logits_processor=[],
    )  # fmt: skip
    assert torch.equal(out, new_tokens(model, ids, 3))


def test_a_cache_that_does_not_fit_is_refused(model):
    ids = tokens(2, 6)
    other = HybridCache(config("27b"), 2, 64)
    with pytest.raises(ValueError, match="past_key_values: the cache has 3 layers, the model 2"):
        model.generate(ids, past_key_values=other)
    with pytest.raises(ValueError, match="the batch has 2 rows, the cache max_batch_size 1"):
        model.generate(ids, past_key_values=HybridCache(model.config, 1, 64))
    full = HybridCache(model.config, 2, 64)
    with torch.no_grad():
        model(tokens(2, 8), past_key_values=full)  # the cache does not know which tokens
    with pytest.raises(ValueError, match=r"holds 8 tokens of row 0, the prompt has 6: .*crop"):
        model.generate(ids, past_key_values=full)
    assert full.lengths.tolist() == [8, 8]


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        empty = gemma2.Gemma2ForCausalLM(config("three"))
    with pytest.raises(ValueError, match="on the meta device: it has no weights yet"):
        empty.generate(tokens(1, 6))
