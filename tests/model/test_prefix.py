"""A cache that `generate` left keeps what the next prompt begins with, too."""

from __future__ import annotations

import pytest
import torch

from gemma2 import HybridCache
from tests.model.factories import lively, padded, tokens

NEW = {"max_new_tokens": 6, "eos_token_id": []}
SLOTS = 128  # of a ring


@pytest.fixture(scope="module")
def model():
    return lively("three")


def read_by(model, ids, cache, **options):
    """Generate; give the new text and how many columns the model has read, new tokens included."""
    columns = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append([*args, *kwargs.values()][0].shape[1]),
        with_kwargs=True,
    )
    try:
        return model.generate(ids, past_key_values=cache, **{**NEW, **options}), sum(columns)
    finally:
        hook.remove()


def edited(ids, at):
    """`ids` with other tokens from column `at` on."""
    return torch.cat([ids[:, :at], (ids[:, at:] + 1) % 90 + 3], dim=1)


@pytest.mark.parametrize("at", [1, 11, 19])
def test_a_text_that_was_edited_is_read_from_the_edit_on(model, at):
    ids, cache = tokens(1, 20), HybridCache(model.config, 1)
    model.generate(ids, past_key_values=cache, **NEW)
    changed = edited(ids, at)
    out, read = read_by(model, changed, cache)
    assert torch.equal(out, model.generate(changed, **NEW))
    assert read == 20 - at + 5
    assert cache.reprocessed == 0
    assert cache.text == [out[0, :-1].tolist()]


def test_the_same_prompt_again_is_read_from_its_last_token_on(model):
    ids, cache = tokens(1, 20), HybridCache(model.config, 1)
    first = model.generate(ids, past_key_values=cache, **NEW)
    assert read_by(model, ids, cache)[1] == 1 + 5
    assert torch.equal(model.generate(ids, past_key_values=cache, **NEW), first)
    shorter = ids[:, :7]
    assert torch.equal(read_by(model, shorter, cache)[0], model.generate(shorter, **NEW))


def test_a_conversation_reads_nothing_twice(model):
    cache, text = HybridCache(model.config, 1), tokens(1, 12)
    total = 0
    for turn in range(4):
        text, read = read_by(model, text, cache)
        total += read
        text = torch.cat([text, tokens(1, 5, seed=turn)], dim=1)
    assert total == text.shape[1] - 5 - 1  # all but the last answer's last token
    assert cache.reprocessed == 0


def test_beyond_the_rings_reach_the_row_is_read_again_and_counted(model):
    ids, cache = tokens(1, 2 * SLOTS), HybridCache(model.config, 1)
    model.generate(ids, past_key_values=cache, **NEW)
    changed = edited(ids, 50)
    out, read = read_by(model, changed, cache)
    assert torch.equal(out, model.generate(changed, **NEW))
    assert read == 2 * SLOTS + 5
    assert cache.reprocessed == 50


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_keeps_what_it_has_in_common(model, side):
    rows = [tokens(1, n, seed=n)[0] for n in (20, 3, 2 * SLOTS)]
    ids, mask = padded(rows, side)
    cache = HybridCache(model.config, 3)
    model.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    rows = [edited(rows[0][None], 15)[0], torch.cat([rows[1], tokens(1, 4)[0]]), rows[2]]
    rows[2] = edited(rows[2][None], 40)[0]
    ids, mask = padded(rows, side)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, **NEW))
    assert cache.reprocessed == 40


def test_samples_of_one_prompt_share_what_it_has_in_common(model):
    ids, cache = tokens(1, 20), HybridCache(model.config, 3)
    options = {"do_sample": True, "num_return_sequences": 3, "seed": 5}
    model.generate(ids, past_key_values=cache, **options, **NEW)
    changed = edited(ids, 9)
    out, read = read_by(model, changed, cache, **options)
    assert torch.equal(out, model.generate(changed, **options, **NEW))
    assert read == 11 + 5


@pytest.mark.parametrize(
    "change",
    [
        lambda model, cache: model(tokens(1, 1), past_key_values=cache),
        lambda _, cache: cache.reset(),
    ],
    ids=["forward", "reset"],
)
def test_a_cache_that_is_written_by_hand_has_a_text_that_is_not_known(model, change):
    cache = HybridCache(model.config, 1)
    model.generate(tokens(1, 20), past_key_values=cache, **NEW)
    assert cache.text is not None
    with torch.no_grad():
        change(model, cache)
    assert cache.text is None


def test_crop_reorder_and_restore_keep_the_text_known(model):
    cache = HybridCache(model.config, 3)
    ids = tokens(2, 20)
    a, b = model.generate(ids, past_key_values=cache, **NEW)[:, :-1].tolist()
    assert cache.text == [a, b]
    taken = cache.snapshot()
    cache.crop(torch.tensor([9]))
    assert cache.text == [a[:9], b]
    cache.restore(taken)
    assert cache.text == [a, b]
    cache.crop(-3)
    assert cache.text == [a[:-3], b[:-3]]
    cache.reorder(torch.tensor([1, 2, 0]))
    assert cache.text == [b[:-3], [], a[:-3]]
    cache.reorder(torch.tensor([2]))
    assert cache.text == [a[:-3], [], a[:-3]]
    cache.crop(0)
    assert cache.text == [[], [], []]


def test_an_error_leaves_the_cache_as_it_was(model):
    cache = HybridCache(model.config, 1, 30)
    model.generate(tokens(1, 20), past_key_values=cache, **NEW)
    text = cache.text
    with pytest.raises(ValueError, match="max_cache_len"):
        model.generate(edited(tokens(1, 20), 5), past_key_values=cache, max_new_tokens=40)
    assert cache.text == text
    assert cache.get_seq_length() == 25
