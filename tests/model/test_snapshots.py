"""Beyond the rings' margin `generate` goes back by snapshots, and reads again only what none holds."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gemma2 import Gemma2ForCausalLM, HybridCache
from tests.model.factories import config, lively, load, padded, tokens

WINDOW, MARGIN, SLOTS = 100, 28, 128
NEW = {"max_new_tokens": 60, "eos_token_id": []}  # more than the margin


@functools.cache
def model_of(window=WINDOW):
    """The lively model with a window that leaves rings of 128 slots little margin."""
    cfg = config("three", tie_word_embeddings=False, sliding_window=window)
    model = Gemma2ForCausalLM(cfg)
    load(model, lively("three").state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


def new_cache(rows=1, keep=2, length=None):
    return HybridCache(model_of().config, rows, length, margin=MARGIN, keep_snapshots=keep)


class Reads:
    """Counts the tokens that a model reads, padding left out."""

    def __init__(self, model):
        self.model, self.total = model, 0

    def __enter__(self):
        def count(_, args, kwargs):
            ids, mask, *_ = [*args, *kwargs.values()]
            self.total += ids.numel() if mask is None else int(mask.sum())

        self.hook = self.model.model.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()


def read_by(model, ids, cache, **options):
    """The text, which must be the one without a cache, and how many tokens of the prompts were read."""
    options = {**NEW, **options}
    with Reads(model) as reads:
        out = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(out, model.generate(ids, **options))
    return out, reads.total - out.shape[0] * (options["max_new_tokens"] - 1)


def said(n, seed):
    return tokens(1, n, seed=seed)


def joined(*parts):
    return torch.cat(parts, dim=1)


# ---- going back ---------------------------------------------------------------------------------


def test_the_last_answer_is_written_again_without_reading_the_prompt_again(model):
    cache, ids = new_cache(), said(200, 0)
    assert read_by(model, ids, cache)[1] == 200
    for _ in range(2):
        assert read_by(model, ids, cache)[1] == 1
    assert cache.reprocessed == 0


def test_a_changed_last_message_is_all_that_is_read(model):
    cache, text = new_cache(), said(150, 0)
    for turn in range(3):
        before = text
        text, _ = read_by(model, joined(before, said(40, turn)), cache)
    for turn in range(3, 6):  # as often as wanted, and with messages of other lengths
        changed, read = read_by(model, joined(before, said(10 * turn, turn)), cache)
        assert read == 10 * turn + 1, "the message, and the last token of the answer before"
    assert cache.reprocessed == 3, "that token: it is not held when its turn ends"
    assert read_by(model, joined(changed, said(5, 9)), cache)[1] == 6


def test_an_answer_in_other_tokens_is_read_again_and_nothing_before_it(model):
    cache, ids = new_cache(), said(200, 0)
    answered = model.generate(ids, past_key_values=cache, **NEW)
    other = joined(answered[:, :203], said(50, 5), said(30, 6))
    assert read_by(model, other, cache)[1] == 83
    assert cache.reprocessed == 3


def test_without_snapshots_all_is_read_again_and_counted(model):
    cache, ids = new_cache(keep=0), said(200, 0)
    model.generate(ids, past_key_values=cache, **NEW)
    assert read_by(model, ids, cache)[1] == 200
    assert cache.reprocessed == 199


def test_an_edit_further_back_than_the_snapshots_is_read_from_the_beginning(model):
    cache, text = new_cache(), said(150, 0)
    for turn in range(3):
        text, _ = read_by(model, joined(text, said(40, turn)), cache)
    other = joined(text[:, :60], said(200, 8))
    assert read_by(model, other, cache)[1] == 260
    assert cache.reprocessed == 60


def test_a_snapshot_does_not_bring_back_what_the_full_layers_have_lost(model):
    cache, ids = new_cache(keep=1), said(200, 0)
    model.generate(ids, past_key_values=cache, **NEW)
    (taken,) = cache.snapshots()
    other = joined(ids[:, :30], said(70, 1))
    read_by(model, other, cache, max_new_tokens=2)
    assert cache.snapshots() == [taken]
    assert read_by(model, ids, cache)[1] == 170, "the first 30 are in both"


def test_a_small_edit_before_does_not_cost_the_end_of_the_turn(model):
    """The prompt's snapshot was cropped, so it is of another text, and the first to go."""
    cache, text = new_cache(), said(150, 0)
    for turn in range(2):
        before = text
        text, _ = read_by(model, joined(before, said(60, turn)), cache)
    message = said(60, 1)
    assert read_by(model, joined(before, message[:, :50], said(9, 7)), cache)[1] == 9
    assert read_by(model, joined(before, said(60, 8)), cache)[1] == 61
    assert cache.reprocessed == 1


# ---- what is kept -------------------------------------------------------------------------------


def test_no_snapshot_is_taken_while_cropping_suffices(model):
    cache = new_cache(length=500)
    text = model.generate(said(60, 0), past_key_values=cache, **NEW)
    assert cache.snapshots() == []
    text = model.generate(
        joined(text, said(2, 1)), past_key_values=cache, **{**NEW, "max_new_tokens": 7}
    )
    assert cache.snapshots() == [], "128 slots hold them all"
    model.generate(joined(text, said(2, 1)), past_key_values=cache, **{**NEW, "max_new_tokens": 20})
    assert cache.snapshots() == [], "the margin reaches back so far"
    read_by(model, said(60, 0), cache)


@pytest.mark.parametrize("past", [0, 1])
def test_a_snapshot_is_taken_as_soon_as_the_margin_is_too_short_by_one_token(model, past):
    """The next prompt may be the same, of which the last token is read again."""
    cache, options = new_cache(keep=1), {"max_new_tokens": MARGIN + past}
    assert read_by(model, said(200, 0), cache, **options)[1] == 200
    assert len(cache.snapshots()) == past
    assert read_by(model, said(200, 0), cache, **options)[1] == 1


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_no_more_are_kept_than_asked_for_and_their_bytes_are_counted(model, keep):
    cache, text = new_cache(keep=keep, length=800), said(150, 0)
    for turn in range(4):
        text, _ = read_by(model, joined(text, said(20, turn)), cache)
    bare = HybridCache(model.config, 1, 800, "cpu", torch.float32, margin=MARGIN)
    ring = bare[0][0].nbytes + bare[0][1].nbytes
    assert bare.layers[0].wraps
    assert len(cache.snapshots()) == keep
    assert cache.nbytes == bare.nbytes + keep * ring


def test_a_ring_is_copied_as_far_as_it_is_used(model):
    cache = new_cache(length=500)
    model.generate(said(40, 0), past_key_values=cache, **{**NEW, "max_new_tokens": 120})
    (taken,) = cache.snapshots()
    assert [None if ring is None else ring[0].shape[2] for ring in taken.rings] == [40, None]


def test_reset_and_copies_are_without_the_snapshots_that_are_kept(model):
    import copy

    cache = new_cache()
    model.generate(said(200, 0), past_key_values=cache, **NEW)
    twin = copy.deepcopy(cache)
    assert twin.snapshots() == []
    assert twin.text == cache.text
    assert read_by(model, said(200, 0), twin)[1] == 200
    cache.reset()
    assert cache.snapshots() == []
    assert read_by(model, said(200, 0), cache)[1] == 200


def test_a_snapshot_that_was_asked_for_is_gone_back_to_while_it_lives(model):
    cache = new_cache(keep=0)
    text = model.generate(said(200, 0), past_key_values=cache, **NEW)
    taken = cache.snapshot()
    model.generate(joined(text, said(9, 1)), past_key_values=cache, **NEW)
    assert read_by(model, joined(text, said(9, 2)), cache)[1] == 10
    cache.restore(taken)  # the full layers have been written again, with the same text
    assert cache.text == text[:, :-1].tolist()
    assert read_by(model, joined(text, said(9, 3)), cache)[1] == 10
    del taken
    assert read_by(model, joined(text, said(9, 4)), cache)[1] == 269


def test_a_snapshot_of_another_text_is_still_refused(model):
    cache = new_cache(keep=0)
    text = model.generate(said(200, 0), past_key_values=cache, **NEW)
    taken = cache.snapshot()
    model.generate(joined(text[:, :100], said(190, 1)), past_key_values=cache, **NEW)
    with pytest.raises(ValueError, match="restore: row 0 had 259 tokens, and position 0 has been"):
        cache.restore(taken)


def test_a_snapshot_that_was_kept_may_be_restored_while_its_text_is_there(model):
    cache, ids = new_cache(keep=1), said(200, 0)
    model.generate(ids, past_key_values=cache, **NEW)
    (taken,) = cache.snapshots()
    cache.restore(taken)
    assert cache.text == ids.tolist()
    model.generate(said(100, 1), past_key_values=cache, **{**NEW, "max_new_tokens": 2})
    assert cache.snapshots() == [taken], "no other one has been taken"
    with pytest.raises(ValueError, match="restore: row 0 had 200 tokens, and position 0 has been"):
        cache.restore(taken)


def test_keep_snapshots_must_be_a_count():
    with pytest.raises(ValueError, match="keep_snapshots is -1: it must be at least 0"):
        new_cache(keep=-1)
    with pytest.raises(TypeError, match="keep_snapshots is True: it must be an integer"):
        new_cache(keep=True)


# ---- several rows -------------------------------------------------------------------------------


def batch(rows):
    ids, mask = padded([row[0] for row in rows], "left")
    return ids, {"attention_mask": mask}


def test_each_row_goes_back_as_far_as_it_must(model):
    cache = new_cache(rows=3, keep=3)
    rows = [said(n, n) for n in (190, 140, 160)]
    for turn in range(2):
        ids, mask = batch(rows)
        out, _ = read_by(model, ids, cache, **mask)
        new = out[:, ids.shape[1] :]
        answered = [joined(row, new[b : b + 1]) for b, row in enumerate(rows)]
        if turn == 0:
            rows = [joined(row, said(30, turn)) for row in answered]
    again, changed, other = rows[0], joined(rows[1][:, :-30], said(20, 7)), said(25, 8)
    ids, mask = batch([again, changed, other])
    assert read_by(model, ids, cache, **mask)[1] == 1 + 21 + 25
    assert cache.reprocessed == 1, "the last token of the answer to the second row's first turn"


def test_snapshots_follow_their_rows_when_these_are_reordered(model):
    cache = new_cache(rows=3)
    rows = [said(200, seed) for seed in range(3)]
    model.generate(joined(*[row.T for row in rows]).T, past_key_values=cache, **NEW)
    cache.reorder(torch.tensor([2, 0, 0]))
    ids = torch.cat([rows[2], rows[0], rows[0]])
    assert read_by(model, ids, cache)[1] == 3
    assert cache.reprocessed == 0


def test_a_snapshot_that_makes_room_for_another_is_gone_back_to_for_the_last_time(model):
    cache = new_cache(rows=2, keep=1)
    first = said(200, 0)
    ids, mask = batch([first, said(150, 1)])
    out, _ = read_by(model, ids, cache, **mask)
    # the end of row 0 takes the place of the snapshot that row 1 wants, in another row of it
    ids, mask = batch([joined(out[:1], said(9, 2)), joined(first, said(5, 3))])
    assert read_by(model, ids, cache, **mask)[1] == 1 + 9 + 5


def test_a_prompt_goes_on_from_whichever_row_holds_it(model):
    """The usual way with several samples: one of them is gone on with."""
    cache = new_cache(rows=4, keep=3)
    options = {"do_sample": True, "num_return_sequences": 4, "seed": 3}
    out, _ = read_by(model, said(200, 0), cache, **options)
    assert read_by(model, joined(out[2:3], said(12, 1)), cache)[1] == 13
    assert torch.equal(read_by(model, said(200, 0), cache, **options)[0], out)
    assert cache.reprocessed == 0
    two = torch.cat([out[3:4], out[1:2]])
    assert read_by(model, joined(two, tokens(2, 5)), cache)[1] == 2 * 6
    assert cache.text[2:] == out[2:, :-1].tolist()


def test_rows_outside_of_the_batch_stay_as_they_are(model):
    cache = new_cache(rows=3)
    rows = [said(200, seed) for seed in range(3)]
    out, _ = read_by(model, torch.cat(rows), cache)
    read_by(model, joined(out[:1], said(70, 5)), cache)
    assert cache.text[1:] == out[1:, :-1].tolist()
    ids, mask = batch([said(4, 9), out[1:2], joined(out[2:], said(3, 4))])
    assert read_by(model, ids, cache, **mask)[1] == 4 + 1 + 4


# ---- at random ----------------------------------------------------------------------------------


class Conversations(RuleBasedStateMachine):
    """Prompts that begin with what some row holds or held; the oracle is generation without a cache."""

    @initialize(
        rows=st.integers(1, 3), keep=st.integers(0, 3), window=st.sampled_from([8, 100, 128])
    )
    def make(self, rows, keep, window):
        self.model = model_of(window)
        self.cache = HybridCache(self.model.config, rows, margin=0, keep_snapshots=keep)
        self.seen = [[int(token) for token in tokens(1, 150)[0]]]
        self.held = None
        self.seed = 0

    def kept(self, prompts):
        """How much of each prompt the cache's row, or a snapshot of it, is known to hold."""
        cache, found = self.cache, []
        capacity, margin = cache.layers[0].capacity, cache.layers[0].margin
        wraps = cache.layers[0].wraps
        for number, prompt in enumerate(prompts):
            choices = [[] for _ in cache.text]
            for row, text in enumerate(cache.text):
                states = [(text, int(cache._written[row]), len(text))]
                for taken in cache.snapshots():
                    source = int(taken.source[row])
                    if source < len(taken.text):
                        old = taken.text[source]
                        states.append((old, int(taken.written[source]), len(old)))
                for old, written, length in states:
                    pairs = zip(old, text, prompt[:-1], strict=False)
                    n = next((i for i, (a, b, c) in enumerate(pairs) if not a == b == c), None)
                    n = min(len(old), len(text), len(prompt) - 1) if n is None else n
                    lost = wraps and written > capacity and n < written - margin and n != length
                    choices[row].append(0 if lost else n)
            best = max(choices[number], default=0) if number < len(choices) else 0
            others = max(
                (n for row, ns in enumerate(choices) if row != number for n in ns), default=0
            )
            found.append((best, max(best, others)))
        return found

    @rule(data=st.data(), new=st.sampled_from([1, 5, 40, 140]), chunk=st.sampled_from([None, 30]))
    def generate(self, data, new, chunk):
        count = data.draw(st.integers(1, self.cache.max_batch_size))
        prompts = []
        for _ in range(count):
            text = self.seen[data.draw(st.integers(0, len(self.seen) - 1))]
            at = data.draw(st.sampled_from([len(text), len(text), len(text) - 1, 100, 1]))
            self.seed += 1
            fresh = tokens(1, data.draw(st.sampled_from([1, 3, 40])), seed=self.seed)[0].tolist()
            prompts.append(
                (text[: max(at, 1)] + fresh)[-330:] if len(text) > 320 else text[:at] + fresh
            )
        ids, mask = padded(
            [torch.tensor(p) for p in prompts], data.draw(st.sampled_from(["left", "right"]))
        )
        options = {
            "attention_mask": mask,
            "max_new_tokens": new,
            "eos_token_id": [],
            "prefill_chunk_size": chunk,
        }
        if data.draw(st.integers(0, 3)) == 0:
            options["prompt_lookup_num_tokens"] = 2
        known = self.kept(prompts) if self.cache.text is not None else [(0, 0)] * count
        if options.get("prompt_lookup_num_tokens") and self.cache.layers[0].window == 128:
            options.pop("prompt_lookup_num_tokens")  # there is no margin
        with Reads(self.model) as reads:
            out = self.model.generate(ids, past_key_values=self.cache, **options)
        wanted = self.model.generate(ids, **options)
        assert torch.equal(out, wanted)
        if "prompt_lookup_num_tokens" not in options:
            read = reads.total - count * (new - 1)
            total = sum(map(len, prompts))
            assert (
                total - sum(most for _, most in known) <= read <= total - sum(n for n, _ in known)
            )
        texts = [p + out[b, ids.shape[1] : -1].tolist() for b, p in enumerate(prompts)]
        assert self.cache.text[:count] == texts
        assert self.cache.lengths[:count].tolist() == list(map(len, texts))
        self.seen = (self.seen + prompts + texts)[-8:]

    @rule(data=st.data())
    def reorder(self, data):
        rows = self.cache.max_batch_size
        self.cache.reorder(torch.tensor([data.draw(st.integers(0, rows - 1)) for _ in range(rows)]))

    @rule(n=st.integers(0, 30))
    def crop(self, n):
        least = self.cache.least_crop(self.cache._written)
        if bool((self.cache.lengths - n >= least).all()):
            self.cache.crop((self.cache.lengths - n).clamp(min=0))

    @rule(more=st.integers(1, 200))
    def grow(self, more):
        self.cache.grow(self.cache.max_cache_len + more)

    @rule()
    def take_a_snapshot(self):
        self.held = self.cache.snapshot()

    @precondition(lambda self: self.held is not None)
    @rule()
    def drop_it(self):
        self.held = None


@pytest.mark.slow
class TestConversations(Conversations.TestCase):
    settings = settings(
        max_examples=25 if os.environ.get("HYPOTHESIS_PROFILE") != "soak" else 1000,
        stateful_step_count=10,
        derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "soak",
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
