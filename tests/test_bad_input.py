"""Malformed calls: each is refused with a text that names the argument, and changes nothing.

Malformed files are in tests/model/test_checkpoint.py and test_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import HybridCache, ops
from tests.model import factories as F

PAST = 5
Calls = dict[str, tuple[Callable[..., Any], type[Exception], str]]


@pytest.fixture
def model() -> Any:
    return F.tiny("three")


@pytest.fixture
def cache(model: Any) -> Any:
    """Two rows of PAST tokens, room for 16."""
    cache = HybridCache(model.config, 2, 16)
    with torch.no_grad():
        model(F.tokens(2, PAST), past_key_values=cache)
    return cache


def state_of(model: Any, cache: Any) -> list[Tensor]:
    """Everything that a failing call might have changed."""
    tensors = [cache.lengths, cache._written, *(t for pair in cache for t in pair)]
    tensors += list(model.parameters())
    facts = [cache.get_seq_length(), cache.max_cache_len, cache.reprocessed, len(cache)]
    facts += [model.training, torch.is_grad_enabled()]
    return [t.detach().clone() for t in tensors] + [torch.tensor(facts)]


def assert_refused(
    model: Any, cache: Any, call: Callable[..., Any], error: type[Exception], text: str
) -> None:
    before = state_of(model, cache)
    with pytest.raises(error, match=text) as caught:
        call(model, cache)
    said = str(caught.value)
    assert len(said) < 600, f"{len(said)} characters are no message: {said[:200]}"
    assert "registered at" not in said
    for b, a in zip(before, state_of(model, cache), strict=True):
        assert torch.equal(b, a), "the refused call has changed something"
    with torch.no_grad():  # and the cache is as good as before
        model(F.tokens(2, 1), past_key_values=cache)
    assert cache.lengths.tolist() == [PAST + 1] * 2


IDS = F.tokens(2, 4)
ONE = F.tokens(2, 1)


def other_cache(**changes: Any) -> Any:
    shape = changes.pop("shape", "three")
    return HybridCache(F.config(shape, **changes), 2, 16)


def additive(value: float = 0.0, *shape: int) -> Tensor:
    return torch.full(shape or (2, 1, 4, 4), value)


MODEL: Calls = {
    "no_input": (lambda m, c: m(past_key_values=c), ValueError, "input_ids"),
    "two_inputs": (
        lambda m, c: m(IDS, inputs_embeds=torch.zeros(2, 4, 40), past_key_values=c),
        ValueError,
        "input_ids.*inputs_embeds",
    ),
    "float_ids": (lambda m, c: m(IDS.float(), past_key_values=c), ValueError, "input_ids.*float32"),
    "flat_ids": (lambda m, c: m(IDS[0], past_key_values=c), ValueError, r"input_ids.*\[4\]"),
    "a_list_of_ids": (
        lambda m, c: m([[5, 6]], past_key_values=c),
        TypeError,
        "input_ids.*list",
    ),
    "id_beyond_the_vocabulary": (
        lambda m, c: m(torch.tensor([[5, 97], [3, 4]]), past_key_values=c),
        ValueError,
        "ids holds 97 .*the table has 97 rows",
    ),
    "negative_id": (
        lambda m, c: m(torch.tensor([[5, -1], [3, 4]]), past_key_values=c),
        ValueError,
        "-1",
    ),
    "embeds_of_another_width": (
        lambda m, c: m(inputs_embeds=torch.zeros(2, 4, 41), past_key_values=c),
        ValueError,
        r"inputs_embeds.*41",
    ),
    "integer_embeds": (
        lambda m, c: m(inputs_embeds=torch.zeros(2, 4, 40, dtype=torch.long), past_key_values=c),
        (TypeError, ValueError),
        r"inputs_embeds.*int64",
    ),
    "mask_of_another_length": (
        lambda m, c: m(IDS, attention_mask=torch.ones(2, 3)),
        ValueError,
        r"attention_mask.*\[2, 3\]",
    ),
    "mask_of_another_batch": (
        lambda m, c: m(IDS, attention_mask=torch.ones(3, 4)),
        ValueError,
        r"attention_mask.*\[3, 4\]",
    ),
    "mask_with_a_two": (
        lambda m, c: m(IDS, attention_mask=torch.full((2, 4), 2)),
        ValueError,
        "attention_mask: holds 2",
    ),
    "additive_mask_of_two_dimensions": (
        lambda m, c: m(IDS, attention_mask=torch.full((2, 4), -math.inf)),
        ValueError,
        "attention_mask: holds -inf",
    ),
    "mask_of_three_dimensions": (
        lambda m, c: m(IDS, attention_mask=torch.ones(2, 4, 4)),
        ValueError,
        r"attention_mask: has shape \[2, 4, 4\].*2 or 4 dimensions",
    ),
    "mask_that_disagrees_with_the_cache": (
        lambda m, c: m(
            ONE, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2), past_key_values=c
        ),
        ValueError,
        r"attention_mask.*row 0 has 4 tokens.*the cache has 5",
    ),
    "mask_that_is_a_list": (
        lambda m, c: m(IDS, attention_mask=[[1, 1, 1, 1]] * 2),
        TypeError,
        "attention_mask.*list",
    ),
    "four_d_mask_without_the_cached_columns": (
        lambda m, c: m(ONE, attention_mask=additive(0, 2, 1, 1, 1), past_key_values=c),
        ValueError,
        r"attention_mask.*\[2, 1, 1, 1\]",
    ),
    "four_d_mask_of_integers": (
        lambda m, c: m(IDS, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.long)),
        TypeError,
        "attention_mask.*int64",
    ),
    "four_d_mask_of_three_heads_for_two": (
        lambda m, c: m(IDS, attention_mask=additive(0, 2, 2, 4, 4)),
        ValueError,
        r"attention_mask.*\[2, 2, 4, 4\]",
    ),
    "dict_of_masks_with_a_missing_kind": (
        lambda m, c: m(IDS, attention_mask={"full_attention": additive()}),
        ValueError,
        r"attention_mask.*sliding_attention",
    ),
    "position_ids_of_another_length": (
        lambda m, c: m(IDS, position_ids=torch.arange(5)[None]),
        ValueError,
        r"position_ids.*\[1, 5\]",
    ),
    "float_position_ids": (
        lambda m, c: m(IDS, position_ids=torch.arange(4.0)[None]),
        TypeError,
        "position_ids.*float32",
    ),
    "cache_position_that_does_not_go_on": (
        lambda m, c: m(ONE, cache_position=torch.tensor([3]), past_key_values=c),
        ValueError,
        r"cache_position.*\[3\]",
    ),
    "cache_position_of_another_length": (
        lambda m, c: m(ONE, cache_position=torch.tensor([5, 6]), past_key_values=c),
        ValueError,
        r"cache_position.*\[2\]",
    ),
    "bounds_that_end_early": (
        lambda m, c: m(IDS, cu_seqlens=torch.tensor([0, 4, 7])),
        ValueError,
        r"cu_seqlens.*\[0, 4, 7\].*8",
    ),
    "bounds_that_fall": (
        lambda m, c: m(IDS, cu_seqlens=torch.tensor([0, 4, 3, 8])),
        ValueError,
        r"cu_seqlens.*rise",
    ),
    "bounds_across_rows": (
        lambda m, c: m(IDS, cu_seqlens=torch.tensor([0, 6, 8])),
        ValueError,
        r"cu_seqlens.*4 must be in it",
    ),
    "float_bounds": (
        lambda m, c: m(IDS, cu_seqlens=torch.tensor([0.0, 4.0, 8.0])),
        ValueError,
        r"cu_seqlens.*float32",
    ),
    "labels_of_another_shape": (
        lambda m, c: m(IDS, labels=IDS[:, :3], past_key_values=c),
        ValueError,
        r"labels.*\[2, 3\]",
    ),
    "label_beyond_the_vocabulary": (
        lambda m, c: m(IDS, labels=IDS.clone().fill_(97), past_key_values=c),
        ValueError,
        "labels: holds 97",
    ),
    "negative_label": (
        lambda m, c: m(IDS, labels=IDS.clone().fill_(-1), past_key_values=c),
        ValueError,
        "labels: holds -1",
    ),
    "float_labels": (
        lambda m, c: m(IDS, labels=IDS.float(), past_key_values=c),
        ValueError,
        "labels.*float32",
    ),
    "negative_logits_to_keep": (
        lambda m, c: m(IDS, logits_to_keep=-1, past_key_values=c),
        ValueError,
        "logits_to_keep.*-1",
    ),
    "logits_to_keep_beyond_the_columns": (
        lambda m, c: m(IDS, logits_to_keep=torch.tensor([4]), past_key_values=c),
        ValueError,
        "logits_to_keep.*4",
    ),
    "unknown_argument": (
        lambda m, c: m(IDS, atention_mask=torch.ones(2, 4), past_key_values=c),
        TypeError,
        "atention_mask",
    ),
}

CACHE: Calls = {
    "positions_beyond_the_cache": (
        lambda m, c: m(F.tokens(2, 12), past_key_values=c),
        ValueError,
        r"room for 17 tokens.*max_cache_len is 16.*grow\(17\)",
    ),
    "cache_of_more_layers": (
        lambda m, c: m(ONE, past_key_values=other_cache(num_hidden_layers=3, layer_types=None)),
        ValueError,
        "past_key_values: the cache has 3 layers, the model 2",
    ),
    "cache_of_other_heads": (
        lambda m, c: m(
            ONE, past_key_values=other_cache(num_key_value_heads=3, num_attention_heads=3)
        ),
        ValueError,
        "past_key_values.*3 key/value heads, the model 1",
    ),
    "cache_of_another_head_dim": (
        lambda m, c: m(ONE, past_key_values=other_cache(head_dim=128)),
        ValueError,
        "past_key_values.*128.*64",
    ),
    "cache_of_another_window": (
        lambda m, c: m(ONE, past_key_values=other_cache(sliding_window=9)),
        ValueError,
        "past_key_values.*window",
    ),
    "more_rows_than_the_cache": (
        lambda m, c: m(F.tokens(3, 1), past_key_values=c),
        ValueError,
        "past_key_values.*3 rows",
    ),
    "legacy_tuple_cache": (
        lambda m, c: m(ONE, past_key_values=((torch.zeros(1), torch.zeros(1)),)),
        TypeError,
        "past_key_values.*HybridCache",
    ),
    "crop_beyond_the_row": (lambda m, c: c.crop(-6), ValueError, "crop: n is -6"),
    "crop_by_a_float": (lambda m, c: c.crop(2.0), TypeError, "crop: n is a float"),
    "crop_by_a_bool": (lambda m, c: c.crop(True), TypeError, "crop: n is a bool"),
    "crop_of_more_rows": (
        lambda m, c: c.crop(torch.tensor([1, 1, 1])),
        ValueError,
        r"crop: n is torch.int64 \[3\]",
    ),
    "crop_by_a_float_tensor": (
        lambda m, c: c.crop(torch.tensor([1.0, 1.0])),
        ValueError,
        "crop: n is torch.float32",
    ),
    "reorder_out_of_range": (
        lambda m, c: c.reorder(torch.tensor([0, 2])),
        ValueError,
        r"reorder.*\[0, 2\].*0 to 1",
    ),
    "reorder_negative": (
        lambda m, c: c.reorder(torch.tensor([-1, 0])),
        ValueError,
        r"reorder.*-1",
    ),
    "reorder_by_floats": (
        lambda m, c: c.reorder(torch.tensor([0.0, 1.0])),
        ValueError,
        "reorder.*float32",
    ),
    "shrink": (lambda m, c: c.grow(8), ValueError, "grow: new_max_len is 8"),
    "grow_by_a_float": (lambda m, c: c.grow(20.0), TypeError, "new_max_len.*20.0"),
    "advance_beyond": (lambda m, c: c.advance(12), ValueError, "advance: 12 tokens after 5"),
    "advance_back": (lambda m, c: c.advance(-1), ValueError, "n is -1"),
    "restore_of_nothing": (lambda m, c: c.restore(None), TypeError, "restore: got a NoneType"),
    "restore_of_another_cache": (
        lambda m, c: c.restore(other_cache().snapshot()),
        ValueError,
        "restore: the snapshot is of another cache",
    ),
    "cache_without_a_config": (
        lambda m, c: HybridCache({"num_hidden_layers": 2}, 1, 8),
        TypeError,
        "HybridCache: config is a dict",
    ),
    "cache_of_no_rows": (
        lambda m, c: HybridCache(m.config, 0, 8),
        ValueError,
        "max_batch_size is 0",
    ),
    "cache_of_no_length": (
        lambda m, c: HybridCache(m.config, 1, 0),
        ValueError,
        "max_cache_len is 0",
    ),
    "cache_of_integers": (
        lambda m, c: HybridCache(m.config, 1, 8, dtype=torch.int64),
        TypeError,
        "dtype is torch.int64",
    ),
    "negative_margin": (
        lambda m, c: HybridCache(m.config, 1, 8, margin=-1),
        ValueError,
        "margin is -1",
    ),
}

GENERATE: Calls = {
    "no_new_tokens": (
        lambda m, c: m.generate(IDS, max_new_tokens=0),
        ValueError,
        "max_new_tokens.*0",
    ),
    "float_new_tokens": (
        lambda m, c: m.generate(IDS, max_new_tokens=2.5),
        TypeError,
        "max_new_tokens.*2.5",
    ),
    "negative_temperature": (
        lambda m, c: m.generate(IDS, do_sample=True, temperature=-1.0),
        ValueError,
        "temperature.*-1",
    ),
    "temperature_nan": (
        lambda m, c: m.generate(IDS, do_sample=True, temperature=math.nan),
        ValueError,
        "temperature.*nan",
    ),
    "top_p_of_two": (
        lambda m, c: m.generate(IDS, do_sample=True, top_p=2.0),
        ValueError,
        "top_p.*2.0",
    ),
    "top_p_of_zero": (
        lambda m, c: m.generate(IDS, do_sample=True, top_p=0),
        ValueError,
        "top_p.*0",
    ),
    "negative_top_k": (
        lambda m, c: m.generate(IDS, do_sample=True, top_k=-1),
        ValueError,
        "top_k.*-1",
    ),
    "min_p_of_two": (lambda m, c: m.generate(IDS, do_sample=True, min_p=2), ValueError, "min_p.*2"),
    "no_repetition_penalty": (
        lambda m, c: m.generate(IDS, repetition_penalty=0.0),
        ValueError,
        "repetition_penalty.*0",
    ),
    "misspelt_option": (
        lambda m, c: m.generate(IDS, max_new_token=3),
        TypeError,
        "max_new_token.*max_new_tokens",
    ),
    "beams": (lambda m, c: m.generate(IDS, num_beams=0), ValueError, "num_beams is 0"),
    "more_texts_than_beams": (
        lambda m, c: m.generate(IDS, num_beams=2, num_return_sequences=3),
        ValueError,
        "num_return_sequences is 3",
    ),
    "several_greedy_texts": (
        lambda m, c: m.generate(IDS, num_return_sequences=2),
        ValueError,
        "num_return_sequences is 2",
    ),
    "a_row_of_padding": (
        lambda m, c: m.generate(IDS, attention_mask=torch.tensor([[1] * 4, [0] * 4])),
        ValueError,
        "row 1 has no token",
    ),
    "mask_of_another_length": (
        lambda m, c: m.generate(IDS, attention_mask=torch.ones(2, 5)),
        ValueError,
        r"attention_mask.*\[2, 5\]",
    ),
    "id_beyond_the_vocabulary": (
        lambda m, c: m.generate(torch.tensor([[200]])),
        ValueError,
        r"input_ids\[0, 0\] is 200",
    ),
    "no_tokens": (
        lambda m, c: m.generate(torch.zeros(2, 0, dtype=torch.long)),
        ValueError,
        r"input_ids.*\[2, 0\]",
    ),
    "eos_beyond_the_vocabulary": (
        lambda m, c: m.generate(IDS, eos_token_id=97),
        ValueError,
        "eos_token_id is 97",
    ),
    "cache_too_small": (
        lambda m, c: m.generate(F.tokens(2, 6), past_key_values=c, max_new_tokens=20),
        ValueError,
        "max_cache_len 16.*grow",
    ),
    "cache_with_more_than_the_prompt": (
        lambda m, c: m.generate(F.tokens(2, 3), past_key_values=c, max_new_tokens=2),
        ValueError,
        "past_key_values holds 5 tokens",
    ),
    "cache_of_another_model": (
        lambda m, c: m.generate(IDS, past_key_values=other_cache(head_dim=128)),
        ValueError,
        "past_key_values.*128",
    ),
    "streamer_that_is_none": (
        lambda m, c: m.generate(IDS, streamer=print, max_new_tokens=1),
        TypeError,
        "streamer.*put",
    ),
    "stream_checks_before_the_first_token": (
        lambda m, c: m.stream(IDS, top_p=3.0, do_sample=True),
        ValueError,
        "top_p",
    ),
    "prompt_beyond_max_length": (
        lambda m, c: m.generate(IDS, max_length=4),
        ValueError,
        "max_length is 4",
    ),
}


def heads(q_heads: int = 4, kv_heads: int = 2, dim: int = 64, **changes: Tensor) -> Any:
    """Arguments of ops.attention: 2 rows, 3 queries, 8 slots."""
    arguments = {
        "q": torch.zeros(2, q_heads, 3, dim),
        "k": torch.zeros(2, kv_heads, 8, dim),
        "v": torch.zeros(2, kv_heads, 8, dim),
        "q_start": torch.zeros(2, dtype=torch.long),
        "kv_len": torch.full((2,), 3),
        "scale": 1.0,
    }
    return {**arguments, **changes}


def attend(**changes: Any) -> Callable[..., Any]:
    sizes = {k: changes.pop(k) for k in ("q_heads", "kv_heads", "dim") if k in changes}
    return lambda m, c: ops.attention(**heads(**sizes, **changes))


OPS: Calls = {
    "heads_that_do_not_divide": (
        attend(q_heads=8, kv_heads=3),
        ValueError,
        "attention: k has 3 heads, q has 8: the number of query heads must be a multiple",
    ),
    "k_and_v_differ": (attend(v=torch.zeros(2, 2, 7, 64)), ValueError, "attention: k has shape"),
    "another_head_dim": (
        attend(k=torch.zeros(2, 2, 8, 128), v=torch.zeros(2, 2, 8, 128)),
        ValueError,
        "attention: k has head_dim 128, q has 64",
    ),
    "int32_lengths": (
        attend(kv_len=torch.full((2,), 3, dtype=torch.int32)),
        ValueError,
        "attention: kv_len is int32",
    ),
    "lengths_of_another_batch": (
        attend(q_start=torch.zeros(3, dtype=torch.long)),
        ValueError,
        r"attention: q_start has shape \[3\]",
    ),
    "negative_softcap": (attend(softcap=-1.0), ValueError, "attention: softcap is -1"),
    "softcap_nan": (attend(softcap=math.nan), ValueError, "attention: softcap is nan"),
    "negative_window": (attend(window=-1), ValueError, "attention: window is -1"),
    "scale_inf": (attend(scale=math.inf), ValueError, "attention: scale is inf"),
    "int8_cache": (
        attend(k_scale=torch.ones(2, 2, 8)),
        ValueError,
        "attention: k_scale",
    ),
    "float64_queries": (
        attend(q=torch.zeros(2, 4, 3, 64, dtype=torch.float64)),
        ValueError,
        "attention: q is float64",
    ),
    "norm_of_another_width": (
        lambda m, c: ops.rms_norm(torch.zeros(2, 5), torch.zeros(4), 1e-6),
        ValueError,
        r"rms_norm: weight has shape \[4\]",
    ),
    "geglu_of_two_shapes": (
        lambda m, c: ops.geglu(torch.zeros(2, 5), torch.zeros(2, 4)),
        ValueError,
        "geglu: gate has shape",
    ),
    "softcap_of_zero": (
        lambda m, c: ops.softcap(torch.zeros(3), 0.0),
        ValueError,
        "softcap: cap is 0",
    ),
    "linear_of_another_width": (
        lambda m, c: ops.linear(torch.zeros(2, 5), torch.zeros(3, 4)),
        ValueError,
        r"linear: weight has shape \[3, 4\]",
    ),
    "linear_of_two_dtypes": (
        lambda m, c: ops.linear(torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16)),
        ValueError,
        "linear: .*bfloat16",
    ),
    "embed_beyond_the_table": (
        lambda m, c: ops.embed(torch.tensor([7]), torch.zeros(7, 4), 1.0),
        ValueError,
        "embed: ids holds 7",
    ),
    "rope_of_another_length": (
        lambda m, c: ops.rope(
            torch.zeros(1, 2, 3, 64),
            torch.zeros(1, 1, 3, 64),
            torch.zeros(1, 4, 32),
            torch.zeros(1, 4, 32),
        ),
        ValueError,
        "rope: cos has shape",
    ),
    "write_into_a_cache_of_other_heads": (
        lambda m, c: ops.cache_write(
            c[0][0],
            c[0][1],
            torch.zeros(2, 2, 1, 64),
            torch.zeros(2, 2, 1, 64),
            torch.zeros(2, dtype=torch.long),
            torch.ones(2, dtype=torch.long),
        ),
        ValueError,
        "cache_write: .*heads|cache_write: .*shape",
    ),
    "write_in_place_of_what_requires_grad": (
        lambda m, c: ops.add_rms_norm_(
            torch.zeros(2, 4),
            torch.zeros(2, 4, requires_grad=True),
            torch.zeros(4),
            torch.zeros(4),
            1e-6,
        ),
        RuntimeError,
        "add_rms_norm_: x requires grad",
    ),
    "sample_of_nan": (
        lambda m, c: ops.sample(torch.full((1, 8), math.nan), None, 0, torch.tensor(0)),
        ValueError,
        "sample: row 0 of logits has NaN",
    ),
    "sample_with_negative_top_k": (
        lambda m, c: ops.sample(torch.zeros(1, 8), None, 0, torch.tensor(0), top_k=-1),
        ValueError,
        "sample: top_k is -1",
    ),
}

HEADS: Calls = {
    "batch_without_a_pad_id": (
        lambda m, c: F.build(F.config("three", pad_token_id=None), "sequence")(IDS),
        ValueError,
        "pad_token_id",
    ),
    "labels_of_another_batch": (
        lambda m, c: F.tiny("three", "sequence")(IDS, labels=torch.tensor([0])),
        ValueError,
        r"labels.*\[1\].*\[2\]",
    ),
    "label_beyond_the_classes": (
        lambda m, c: F.tiny("three", "sequence")(IDS, labels=torch.tensor([0, 2])),
        ValueError,
        "labels.*from 0 to 1",
    ),
    "float_labels_for_one_of_them": (
        lambda m, c: F.tiny("three", "sequence", problem_type="single_label_classification")(
            IDS, labels=torch.zeros(2)
        ),
        ValueError,
        "labels.*float32.*single_label",
    ),
    "token_labels_of_another_length": (
        lambda m, c: F.tiny("three", "token")(IDS, labels=torch.zeros(2, 3, dtype=torch.long)),
        ValueError,
        r"labels.*\[2, 3\]",
    ),
    "token_label_beyond_the_classes": (
        lambda m, c: F.tiny("three", "token")(IDS, labels=torch.full((2, 4), 2)),
        ValueError,
        "labels: holds 2",
    ),
    "model_without_a_config": (
        lambda m, c: gemma2.Gemma2ForCausalLM({"hidden_size": 8}),
        TypeError,
        "config is a dict",
    ),
    "reentrant_checkpointing": (
        lambda m, c: F.build(F.config("three")).gradient_checkpointing_enable(
            {"use_reentrant": True}
        ),
        ValueError,
        "use_reentrant",
    ),
    "transformers_config": (
        lambda m, c: gemma2.Gemma2Model(F.config("three").to_dict()),
        TypeError,
        "config is a dict",
    ),
}

ALL: Calls = {
    f"{group}-{name}": case
    for group, cases in (
        ("model", MODEL),
        ("cache", CACHE),
        ("generate", GENERATE),
        ("ops", OPS),
        ("heads", HEADS),
    )
    for name, case in cases.items()
}


@pytest.mark.filterwarnings("ignore:gemma2. 4-D attention masks")
@pytest.mark.parametrize("name", ALL)
def test_is_refused_and_changes_nothing(name: str, model: Any, cache: Any) -> None:
    call, error, text = ALL[name]
    assert_refused(model, cache, call, error, text)


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 40


def test_an_error_deep_in_a_layer_leaves_the_cache_as_it_was(model: Any, cache: Any) -> None:
    class BrokenError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise BrokenError

    before = cache.lengths.clone()
    want = model(F.tokens(2, 3), attention_mask=None).logits
    for tokens in (1, 3):
        hook = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(BrokenError), torch.no_grad():
            model(F.tokens(2, tokens), past_key_values=cache)
        hook.remove()
        assert torch.equal(cache.lengths, before)
    with torch.no_grad():
        whole = torch.cat([F.tokens(2, PAST), F.tokens(2, 3)], dim=1)
        got = model(F.tokens(2, 3), past_key_values=cache).logits
        want = model(whole).logits[:, PAST:]
    assert F.relative_error(got, want.double()) < 1e-5
