"""Every cache of transformers, and our own for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gemma2
from gemma2.integrations.transformers import HybridCache
from tests.integrations.transformers.twins import WINDOW, config, model, truth
from tests.model import factories as F

CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda cfg: transformers.DynamicCache(config=cfg),
    "linear": lambda cfg: transformers.DynamicCache(),
    "static": lambda cfg: transformers.StaticCache(config=cfg, max_cache_len=40),
    "ours": HybridCache,
    "ours, in one size": lambda cfg: HybridCache(cfg, 3, 40),
}
CHUNKS = {
    "tokens": [1] * 19,
    "one call": [19],
    "to the window's edge": [WINDOW - 1, 1, 1, 1],
    "past it": [WINDOW, 1, 1, WINDOW + 1],
    "chunks": [5, 9, 1, 1, 3],
}


@pytest.mark.parametrize("plan", sorted(CHUNKS))
@pytest.mark.parametrize("name", sorted(CACHES))
@torch.no_grad()
def test_chunks_and_steps_equal_one_call(name: str, plan: str, matrices: list[Tensor]) -> None:
    gemma = model("gemma2")
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (19, 3, 14)], "left")
    exact, cache, done = truth("27b", ids, mask), CACHES[name](gemma.config), 0
    for columns in CHUNKS[plan]:
        past, done = done, done + columns
        out = gemma(ids[:, past:done], attention_mask=mask[:, :done], past_key_values=cache)
        real = mask[:, past:done].bool()
        error = F.relative_error(out.logits[real], exact[:, past:done][real])
        assert error < 1e-5, f"columns {past} to {done}: {error:.1e}"
        assert int(cache.get_seq_length()) == done
    assert not matrices, "a matrix [S, S] was made"


@pytest.mark.parametrize("name", sorted(CACHES))
@torch.no_grad()
def test_a_right_padded_batch_goes_on(name: str) -> None:
    gemma = model("gemma2")
    rows, more = [F.tokens(1, n, n)[0] for n in (12, 3, 9)], F.tokens(3, 6, 77)
    ids, mask = F.padded(rows, "right")
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    cache, eager_cache = CACHES[name](gemma.config), transformers.DynamicCache()
    position_ids = longer.cumsum(1) - 1
    for model_, kept in ((gemma, cache), (model("eager"), eager_cache)):
        model_(ids, attention_mask=mask, past_key_values=kept)
    ours, theirs = (
        m(more, attention_mask=longer, position_ids=position_ids[:, 12:], past_key_values=kept)
        for m, kept in ((gemma, cache), (model("eager"), eager_cache))
    )
    alone = torch.cat(
        [truth("27b", torch.cat([r, m])[None])[:, -6:] for r, m in zip(rows, more, strict=True)]
    )
    if name.startswith("ours"):  # the window counts tokens, so padding does not matter
        assert F.relative_error(ours.logits, alone) < 1e-5
        assert F.relative_error(theirs.logits, alone) > 1e-3
    else:
        assert F.relative_error(ours.logits, theirs.logits) < 1e-5


@pytest.mark.parametrize("first", [0, 5])
@torch.no_grad()
def test_padding_between_tokens_is_no_part_of_our_cache(first: int) -> None:
    gemma, cache = model("gemma2"), HybridCache(model("gemma2").config)
    ids, mask = F.tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 2:4], mask[0, 9], mask[0, 17], mask[1, 7] = 0, 0, 0, 0
    position_ids = mask.cumsum(1) - 1
    logits = []
    for part in (slice(0, first), slice(first, 20)):
        if part.stop:
            out = gemma(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=position_ids[:, part],
                past_key_values=cache,
            )
            logits.append(out.logits)
    for row, seen in enumerate(mask.bool()):
        alone = truth("27b", ids[row][seen][None])
        assert F.relative_error(torch.cat(logits, dim=1)[row][seen], alone[0]) < 1e-5


@torch.no_grad()
def test_our_ring_is_read_where_it_lies_and_holds_the_window_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gemma, read = model("gemma2"), []
    usual = gemma2.ops.attention
    monkeypatch.setattr(
        gemma2.ops, "attention", lambda q, k, *a, **o: read.append(k) or usual(q, k, *a, **o)
    )
    cache = HybridCache(gemma.config, max_cache_len=600)
    ids = F.tokens(1, 500)
    gemma(ids[:, :-1], past_key_values=cache)
    read.clear()
    last = gemma(ids[:, -1:], past_key_values=cache).logits
    assert F.relative_error(last, truth("27b", ids)[:, -1:]) < 1e-5
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    assert [k.data_ptr() for k in read] == addresses
    assert [k.shape[2] for k in read] == [128, 640, 128]  # window 8, margin 64 and full, by 128
    assert cache.nbytes == 2 * 4 * 128 * 4 * (128 + 640 + 128)


@torch.no_grad()
def test_gradients_go_through_a_call_with_our_cache() -> None:
    ids = F.tokens(1, 12)
    gemma = F.twin(config(), attention="gemma2")
    cache = HybridCache(gemma.config)
    gemma(ids[:, :5], past_key_values=cache)
    with torch.enable_grad():
        out = gemma(ids[:, 5:], past_key_values=cache)
        out.logits.square().mean().backward()
    assert F.relative_error(out.logits.detach(), truth("27b", ids)[:, 5:]) < 1e-5
    grad = gemma.model.layers[0].self_attn.k_proj.weight.grad
    assert float(grad.abs().sum()) > 0
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_crop_takes_back_columns_also_past_the_window() -> None:
    gemma = model("gemma2")
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (180, 171)], "left")
    cache = HybridCache(gemma.config)
    gemma(ids[:, :160], attention_mask=mask[:, :160], past_key_values=cache)
    wrong = F.tokens(2, 20, 5)
    longer = torch.cat([mask[:, :160], torch.ones_like(wrong)], dim=1)
    gemma(wrong, attention_mask=longer, past_key_values=cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 160
    out = gemma(ids[:, 160:], attention_mask=mask, past_key_values=cache)
    assert F.relative_error(out.logits, truth("27b", ids, mask)[:, 160:]) < 1e-5
    with pytest.raises(ValueError, match="smallest possible n"):
        cache.crop(-150)
    assert cache.get_seq_length() == 180
    cache.crop(-180)  # nothing kept is nothing lost
    out = gemma(ids[:, 9:30], past_key_values=cache)
    assert F.relative_error(out.logits, truth("27b", ids[:, 9:30])) < 1e-5


@torch.no_grad()
def test_a_copy_of_our_cache_goes_its_own_way() -> None:
    gemma = model("gemma2")
    ids = F.tokens(1, 30)
    cache = HybridCache(gemma.config)
    gemma(ids[:, :20], past_key_values=cache)
    other = copy.deepcopy(cache)
    gemma(F.tokens(1, 9, 3), past_key_values=cache)
    out = gemma(ids[:, 20:], past_key_values=other)
    assert F.relative_error(out.logits, truth("27b", ids)[:, 20:]) < 1e-5
    cache.reset()
    out = gemma(ids[:, :9], past_key_values=cache)
    assert F.relative_error(out.logits, truth("27b", ids[:, :9])) < 1e-5


@torch.no_grad()
def test_rows_of_our_cache_can_be_repeated_and_selected() -> None:
    gemma = model("gemma2")
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (20, 9)], "left")
    cache = HybridCache(gemma.config, 4)
    gemma(ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    turned = [1, 0]
    out = gemma(ids[turned, 15:], attention_mask=mask[turned], past_key_values=cache)
    assert F.relative_error(out.logits, truth("27b", ids, mask)[turned, 15:]) < 1e-5
    with pytest.raises(ValueError, match="max_batch_size=6"):
        cache.batch_repeat_interleave(3)


@torch.no_grad()
def test_our_cache_refuses_what_it_does_not_know() -> None:
    ids = F.tokens(1, 5)
    with pytest.raises(ValueError, match='attn_implementation="gemma2" and masks'):
        model("eager")(ids, past_key_values=HybridCache(model("eager").config))
    matrix = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match='attn_implementation="gemma2" and masks'):
        model("gemma2")(ids, attention_mask=matrix, past_key_values=HybridCache(config()))
    cache = HybridCache(config(), 1, 8)
    with pytest.raises(ValueError, match="rows, the cache max_batch_size 1"):
        model("gemma2")(F.tokens(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len is 8"):
        model("gemma2")(F.tokens(1, 9), past_key_values=cache)
    assert cache.get_seq_length() == 0
    model("gemma2")(ids, past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"attention_mask: has shape \[1, 2\]: it must be \[1, 7\]"
    ):
        model("gemma2")(ids[:, :2], attention_mask=torch.ones(1, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="output_attentions"):
        model("gemma2")(ids[:, :1], past_key_values=cache, output_attentions=True)
    with pytest.raises(TypeError, match=r"it must be model\.config"):
        HybridCache("gemma2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_type"):
        HybridCache(transformers.LlamaConfig())


@torch.no_grad()
def test_a_call_that_failed_leaves_our_cache_as_it_was() -> None:
    gemma = F.twin(config(), attention="gemma2")
    ids = F.tokens(1, 19)
    cache = HybridCache(gemma.config)
    gemma(ids[:, :11], past_key_values=cache)

    def fail(*_: Any) -> None:
        raise RuntimeError("lost")

    hook = gemma.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="lost"):
        gemma(ids[:, 11:], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 11
    out = gemma(ids[:, 11:], past_key_values=cache)
    assert F.relative_error(out.logits, truth("27b", ids)[:, 11:]) < 1e-5
