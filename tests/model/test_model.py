"""The body: streams and dtypes, hooks, padding and holes, documents, masks, what it refuses.

Truth is the simplest call of the model itself: one row, nothing but real tokens, no cache.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.model import Gemma2Model, Gemma2RMSNorm, Linear
from tests.model import factories as F

LENGTH = 30  # the window is 8


def model_of(shape: str = "three", **overrides: Any) -> Any:
    return F.tiny(shape, **overrides)


@torch.no_grad()
def logits_of(tokens: Tensor, **inputs: Any) -> Tensor:
    return model_of()(tokens, use_cache=False, **inputs).logits


def new_cache(rows: int = 1, length: int = 200) -> HybridCache:
    return HybridCache(model_of().config, rows, length)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-4, rtol=0)


# ---- streams, dtypes, modules -------------------------------------------------------------------


def test_projections_are_linear_layers_under_the_hubs_names() -> None:
    names = {n for n, m in model_of().named_modules() if isinstance(m, nn.Linear)}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"} <= names
    assert set(model_of().state_dict()) == {*F.state_dict(model_of().config), "lm_head.weight"}


def test_a_bias_is_added() -> None:
    layer = Linear(4, 3)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_everything_returned_has_the_models_dtype(dtype: torch.dtype) -> None:
    model = F.tiny("three", dtype=dtype)
    stream = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, x: stream.append(x[0].dtype))
    out = model(F.tokens(1, 5), output_hidden_states=True, output_attentions=True)
    handle.remove()
    assert {t.dtype for t in (out.logits, *out.hidden_states, *out.attentions)} == {dtype}
    assert stream == [torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]


@torch.no_grad()
def test_hidden_states_are_the_inputs_of_the_layers_and_the_normed_end() -> None:
    model, tokens = model_of(), F.tokens(2, LENGTH)
    out = model.model(tokens, output_hidden_states=True, use_cache=False)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    # collecting them changes nothing
    assert torch.equal(model.model(tokens, use_cache=False).last_hidden_state, out[0])


@torch.no_grad()
def test_inputs_embeds_are_taken_as_scaled_and_left_as_they_are() -> None:
    tokens = F.tokens(2, LENGTH)
    embedded = model_of().get_input_embeddings()(tokens)
    before = embedded.clone()
    out = model_of()(inputs_embeds=embedded, use_cache=False)
    assert torch.equal(out.logits, logits_of(tokens))
    assert torch.equal(embedded, before)
    strided = embedded.transpose(0, 1).contiguous().transpose(0, 1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            again = model_of()(inputs_embeds=strided, use_cache=False).logits
        torch.testing.assert_close(again, out.logits)


def test_new_weights_are_drawn_as_the_config_says() -> None:
    model = Gemma2Model(F.config("27b", initializer_range=0.5, pad_token_id=7))
    assert float(model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert float(model.embed_tokens.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert not model.embed_tokens.weight[7].any()
    assert not model.norm.weight.any()
    assert isinstance(model.norm, Gemma2RMSNorm)


def test_models_are_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Gemma2Model(F.config("9b"))
    assert model.device.type == "meta"
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    # ... and run there, which tells shapes and the cache's memory
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    out = model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert out.last_hidden_state.shape == (2, 5, 56)
    assert out.past_key_values.get_seq_length() == 5


@torch.no_grad()
def test_return_dict_false_gives_a_plain_tuple() -> None:
    out = model_of().model(F.tokens(1, 3), return_dict=False)
    assert type(out) is tuple
    assert isinstance(out[1], HybridCache)


# ---- caches made and not made -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "grad", "use_cache", "made"),
    [
        (False, False, None, True),
        (False, False, False, False),
        (False, True, None, False),
        (True, False, None, False),
        (False, True, True, True),
    ],
)
def test_a_cache_is_made_when_it_is_asked_for_or_costs_no_gradients(
    training: bool, grad: bool, use_cache: bool | None, made: bool
) -> None:
    model = F.build(F.config("three")).train(training)
    with torch.set_grad_enabled(grad):
        out = model(F.tokens(2, 4), use_cache=use_cache)
    assert (out.past_key_values is not None) == made
    assert ("past_key_values" in out) == made


@torch.no_grad()
def test_the_cache_that_was_made_goes_on() -> None:
    tokens = F.tokens(2, LENGTH)
    first = model_of()(tokens[:, :20])
    rest = model_of()(tokens[:, 20:], past_key_values=first.past_key_values)
    assert rest.past_key_values is first.past_key_values
    assert_close(torch.cat([first.logits, rest.logits], 1), logits_of(tokens))


# ---- hooks --------------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_see_the_stream_and_keep_what_they_saw() -> None:
    model, tokens = F.build(F.config("27b")), F.tokens(1, 6)
    states = model.model(tokens, output_hidden_states=True).hidden_states
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    final = []
    model.model.norm.register_forward_hook(lambda _, __, out: final.append(out))
    out = model.model(tokens)
    for got, wanted in zip(seen, states[1:-1], strict=False):
        torch.testing.assert_close(got, wanted)
    assert len(seen) == 3
    assert torch.equal(final[0], out.last_hidden_state)
    torch.testing.assert_close(out.last_hidden_state, states[-1])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("as_tensor", [False, True])
@torch.no_grad()
def test_a_hook_can_steer_the_stream(layer: int, as_tensor: bool) -> None:
    model, tokens = F.build(F.config("three")), F.tokens(1, 6)
    plain = model.model(tokens, output_hidden_states=True, use_cache=False)
    shift = torch.linspace(-3, 3, model.config.hidden_size)

    def steer(_: Any, __: Any, out: Any) -> Any:
        return out[0] + shift if as_tensor else (out[0] + shift, *out[1:])

    model.model.layers[layer].register_forward_hook(steer)
    out = model.model(tokens, output_hidden_states=True, use_cache=False)
    if layer == 0:
        torch.testing.assert_close(out.hidden_states[1], plain.hidden_states[1] + shift)
    assert float((out.last_hidden_state - plain.last_hidden_state).abs().max()) > 0.1


@torch.no_grad()
def test_hooks_on_the_inner_norms_are_called() -> None:
    model, tokens = F.build(F.config("three")), F.tokens(1, 6)
    wanted = model.model(tokens).last_hidden_state
    called = []
    for module in model.modules():
        if isinstance(module, Gemma2RMSNorm):
            module.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model.model(tokens).last_hidden_state, wanted)
    assert len(called) >= 4 * 2 + 1


# ---- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_may_be_any_id(side: str) -> None:
    rows = [F.tokens(1, n, n)[0] for n in (LENGTH, 3, 17)]
    ids, mask = F.padded(rows, side, pad=5)
    out = logits_of(ids, attention_mask=mask)
    assert torch.isfinite(out).all()
    for b, row in enumerate(rows):
        assert_close(out[b, mask[b].bool()], logits_of(row[None])[0])


def test_a_row_of_padding_only_is_finite_and_disturbs_nobody() -> None:
    ids, mask = F.tokens(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    out = logits_of(ids, attention_mask=mask)
    assert torch.isfinite(out).all()
    assert_close(out[:1], logits_of(ids[:1]))


HOLES = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0]])


@torch.no_grad()
def test_padding_between_tokens_is_passed_over() -> None:
    ids, real = F.tokens(2, 12), HOLES.bool()
    out = model_of()(ids, attention_mask=HOLES, output_hidden_states=True, use_cache=False)
    states = [
        model_of()(ids[b][real[b]][None], output_hidden_states=True, use_cache=False)
        for b in range(2)
    ]
    for b, alone in enumerate(states):
        assert_close(out.logits[b, real[b]], alone.logits[0])
        for got, wanted in zip(out.hidden_states, alone.hidden_states, strict=True):
            assert_close(got[b, real[b]], wanted[0])


@torch.no_grad()
def test_holes_with_attentions_point_at_the_callers_columns() -> None:
    ids, real = F.tokens(2, 12), HOLES.bool()
    out = model_of()(ids, attention_mask=HOLES, output_attentions=True, use_cache=False)
    for b in range(2):
        alone = model_of()(ids[b][real[b]][None], output_attentions=True, use_cache=False)
        for got, wanted in zip(out.attentions, alone.attentions, strict=True):
            assert_close(got[b][:, real[b]][:, :, real[b]], wanted[0])
            assert not got[b][:, real[b]][:, :, ~real[b]].any()


@torch.no_grad()
def test_left_padding_after_cached_tokens_is_a_hole_too() -> None:
    tokens = F.tokens(2, 20)
    cache = new_cache(2)
    model_of()(tokens[:, :6], past_key_values=cache)
    ids, mask = F.padded([tokens[0, 6:10], tokens[1, 6:15]], "left")
    out = model_of()(
        ids, attention_mask=torch.nn.functional.pad(mask, (6, 0), value=1), past_key_values=cache
    ).logits
    assert cache.lengths.tolist() == [10, 15]
    assert_close(out[0, 5:], logits_of(tokens)[0, 6:10])
    assert_close(out[1], logits_of(tokens)[1, 6:15])
    out = model_of()(tokens[1:, 10:12].repeat(2, 1), past_key_values=cache).logits
    row = torch.cat([tokens[:1, :10], tokens[1:, 10:12]], 1)
    assert_close(out[:1], logits_of(row)[:, 10:])


# ---- packed documents ---------------------------------------------------------------------------

SIZES = [11, 1, 15, 9]  # documents of one row
BOUNDS = torch.tensor([0, 11, 12, 27, 36])


def documents() -> list[Tensor]:
    return [F.tokens(1, n, i) for i, n in enumerate(SIZES)]


def apart() -> Tensor:
    return torch.cat([logits_of(document) for document in documents()], 1)


def restarting() -> Tensor:
    return torch.cat([torch.arange(n) for n in SIZES])[None]


@pytest.mark.parametrize(
    "how",
    [
        {"cu_seqlens": BOUNDS},
        {"cu_seqlens": BOUNDS.int()},
        {"position_ids": restarting()},
        {"position_ids": restarting(), "cu_seqlens": BOUNDS},
    ],
    ids=["cu_seqlens", "int32", "position_ids", "both"],
)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(how: dict[str, Tensor], training: bool) -> None:
    model = F.build(F.config("three")).train(training)
    packed = torch.cat(documents(), 1)
    out = model(packed, use_cache=False, **how).logits
    assert_close(out, apart())
    changed = packed.clone()
    changed[:, 12:27] = (changed[:, 12:27] + 1) % 90 + 3
    again = model(changed, use_cache=False, **how).logits
    others = torch.ones(36, dtype=torch.bool)
    others[12:27] = False
    assert torch.equal(again[:, others], out[:, others])
    assert not torch.equal(again, out)


def test_bounds_over_several_rows() -> None:
    packed = torch.cat(documents(), 1).view(2, 18)
    out = logits_of(packed, cu_seqlens=torch.tensor([0, 11, 12, 18, 27, 36]))
    assert_close(out[0, :12], apart()[0, :12])
    assert_close(out[1, 9:], apart()[0, 27:])
    assert_close(out[0, 12:], logits_of(packed[:1, 12:])[0])


def test_position_ids_that_go_on_are_one_document() -> None:
    tokens = F.tokens(1, LENGTH)
    # RoPE sees differences only, so an offset changes nothing but rounding
    shifted = logits_of(tokens, position_ids=torch.arange(40, 40 + LENGTH)[None])
    assert_close(shifted, logits_of(tokens))


def test_padding_does_not_start_a_document() -> None:
    # what generation loops pass: pads have position_id 1
    ids, mask = F.padded([F.tokens(1, 20)[0], F.tokens(1, 6)[0]], "left")
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert_close(
        logits_of(ids, attention_mask=mask, position_ids=position_ids)[mask.bool()],
        logits_of(ids, attention_mask=mask)[mask.bool()],
    )


@pytest.mark.parametrize("chunks", [[36], [5, 31], [11, 1, 1, 14, 9], [1] * 36, [30, 6]])
@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens and then nothing"])
@torch.no_grad()
def test_documents_are_kept_apart_across_the_calls_of_a_cache(chunks: list[int], how: str) -> None:
    packed, cache, first, parts = torch.cat(documents(), 1), new_cache(), 0, []
    for n in chunks:
        part = slice(first, first + n)
        inputs = {"position_ids": restarting()[:, part]}
        if how != "position_ids":
            starts = [int(b) - first for b in BOUNDS if first < int(b) < first + n]
            inputs = {"cu_seqlens": torch.tensor([0, *starts, n])}
            if first and first not in BOUNDS.tolist():
                # a chunk that begins inside a document goes on with it, without a word
                inputs = {} if not starts else {"position_ids": restarting()[:, part]}
        parts.append(model_of()(packed[:, part], past_key_values=cache, **inputs).logits)
        first += n
    assert_close(torch.cat(parts, 1), apart())


@torch.no_grad()
def test_crop_goes_back_into_an_earlier_document() -> None:
    packed, cache = torch.cat(documents(), 1), new_cache()
    model_of()(packed, past_key_values=cache, cu_seqlens=BOUNDS)
    cache.crop(20)  # inside the third
    out = model_of()(packed[:, 20:27], past_key_values=cache).logits
    assert_close(out, apart()[:, 20:27])


# ---- 4-D masks and attentions -------------------------------------------------------------------


def causal(columns: int, window: int = 0) -> Tensor:
    i, j = torch.arange(columns)[:, None], torch.arange(columns)
    seen = (j <= i) & ((j > i - window) if window else True)
    return seen[None, None]


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["bool", "additive", "half", "heads", "dict", "dict with None"])
def test_a_4d_mask_of_the_ordinary_rule_changes_nothing(kind: str) -> None:
    tokens, seen = F.tokens(2, LENGTH), causal(LENGTH)
    sliding = causal(LENGTH, model_of().config.sliding_window)
    mask: Any = {
        "bool": seen,
        "additive": additive(seen).expand(2, -1, -1, -1),
        "half": additive(seen).half(),  # the lowest float16 is -65504
        "heads": seen.expand(2, 3, -1, -1),
        "dict": {"full_attention": additive(seen), "sliding_attention": sliding},
        "dict with None": {"full_attention": None, "sliding_attention": sliding},
    }[kind]
    if kind == "half":
        mask = mask.clamp(min=torch.finfo(torch.float16).min)
    with pytest.warns(UserWarning, match="reference attention"):
        out = logits_of(tokens, attention_mask=mask)
    assert_close(out, logits_of(tokens))


@pytest.mark.filterwarnings("ignore:gemma2")
def test_a_4d_mask_replaces_causality_and_a_dict_the_window() -> None:
    tokens = F.tokens(1, LENGTH)
    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    both_ways = logits_of(tokens, attention_mask=everything)
    assert float((both_ways - logits_of(tokens))[0, 0].abs().max()) > 0.01
    verbatim = logits_of(
        tokens,
        attention_mask={"full_attention": causal(LENGTH), "sliding_attention": causal(LENGTH)},
    )
    with torch.no_grad():
        wide = F.tiny("three", sliding_window=LENGTH)(tokens, use_cache=False).logits
    assert_close(verbatim, wide)


@pytest.mark.filterwarnings("ignore:gemma2")
def test_a_query_that_a_mask_leaves_without_keys_gives_finite_numbers() -> None:
    seen = causal(6).clone()
    seen[..., 3, :] = False
    assert torch.isfinite(logits_of(F.tokens(1, 6), attention_mask=seen)).all()


@pytest.mark.filterwarnings("ignore:gemma2")
@pytest.mark.parametrize("extra", [0, 7])
@torch.no_grad()
def test_4d_masks_go_on_from_a_cache(extra: int) -> None:
    tokens, cache = F.tokens(2, LENGTH), new_cache(2)
    model_of()(tokens[:, :20], past_key_values=cache)
    mask = torch.nn.functional.pad(causal(LENGTH)[:, :, 20:], (0, extra), value=True)
    out = model_of()(tokens[:, 20:], attention_mask=mask, past_key_values=cache).logits
    assert_close(out, logits_of(tokens)[:, 20:])


@pytest.mark.filterwarnings("ignore:gemma2")
@torch.no_grad()
def test_a_key_that_the_ring_has_lost_cannot_be_made_visible() -> None:
    cache = HybridCache(model_of().config, 1, 400)
    tokens = F.tokens(1, 160)
    model_of()(tokens, past_key_values=cache)
    mask = torch.ones(1, 1, 1, 161, dtype=torch.bool)
    entries = {"full_attention": mask, "sliding_attention": mask}
    with pytest.raises(ValueError, match="makes column 31 of row 0 visible"):
        model_of()(tokens[:, :1], attention_mask=entries, past_key_values=cache)
    assert cache.get_seq_length() == 160
    # a single mask gets the window added, which hides what is lost
    out = model_of()(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits
    assert_close(out, logits_of(torch.cat([tokens, tokens[:, :1]], 1))[:, -1:])


@pytest.mark.parametrize("cached", [0, 12])
@torch.no_grad()
def test_attentions_are_probabilities_by_the_callers_columns(cached: int) -> None:
    ids, mask = F.padded([F.tokens(1, 20)[0], F.tokens(1, 14)[0]], "left")
    whole = model_of()(ids, attention_mask=mask, output_attentions=True, use_cache=False)
    cache = new_cache(2)
    if cached:
        model_of()(ids[:, :cached], attention_mask=mask[:, :cached], past_key_values=cache)
    part = model_of()(
        ids[:, cached:], attention_mask=mask, output_attentions=True, past_key_values=cache
    )
    real = mask[:, cached:].bool()
    assert_close(part.logits[real], whole.logits[:, cached:][real])
    for got, wanted in zip(part.attentions, whole.attentions, strict=True):
        assert got.shape == (2, 3, 20 - cached, 20)
        rows = got.transpose(1, 2)[real]
        assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
        assert_close(rows, wanted[:, :, cached:].transpose(1, 2)[real])


# ---- training -----------------------------------------------------------------------------------


def test_gradient_checkpointing_refuses_caches_and_reentrance() -> None:
    model = F.build(F.config("three")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        model(F.tokens(1, 3), past_key_values=new_cache())
    assert model(F.tokens(1, 3), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="use_reentrant is True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_frozen_body_trains_what_comes_before_it() -> None:
    model = F.build(F.config("three")).requires_grad_(False)
    embedded = model.get_input_embeddings()(F.tokens(1, 5)).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert float(embedded.grad.abs().max()) > 0  # type: ignore[union-attr]


# ---- refusals -----------------------------------------------------------------------------------

GOOD = F.tokens(2, 5)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"input_ids": None}, "input_ids, inputs_embeds: neither given"),
    "both": ({"inputs_embeds": torch.zeros(2, 5, 40)}, "input_ids, inputs_embeds: both given"),
    "ids of rank 1": ({"input_ids": GOOD[0]}, r"input_ids: is torch.int64 \[5\]"),
    "float ids": ({"input_ids": GOOD.float()}, "input_ids: is torch.float32"),
    "a list": ({"input_ids": [[1, 2]]}, "input_ids: is a list"),
    "no tokens": ({"input_ids": GOOD[:, :0]}, "input_ids: has no tokens"),
    "ids too large": ({"input_ids": GOOD * 0 + 97}, "97"),
    "negative ids": ({"input_ids": GOOD * 0 - 2}, "-2"),
    "embeddings of another size": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 41)},
        r"inputs_embeds: is torch.float32 \[2, 5, 41\]: it must be floating \[B, S, 40\]",
    ),
    "mask too long": ({"attention_mask": torch.ones(2, 6)}, r"attention_mask: has shape \[2, 6\]"),
    "mask too short": ({"attention_mask": torch.ones(2, 4)}, r"attention_mask: has shape \[2, 4\]"),
    "mask of other rows": ({"attention_mask": torch.ones(1, 5)}, r"must be \[2, earlier \+ 5\]"),
    "additive 2-D mask": (
        {"attention_mask": torch.full((2, 5), -1e9)},
        "attention_mask: holds -1000000000.0: a 2-D mask has 1",
    ),
    "mask of rank 3": ({"attention_mask": torch.ones(2, 5, 5)}, "must have 2 or 4 dimensions"),
    "mask that is a list": ({"attention_mask": [[1]]}, "attention_mask: is a list"),
    "4-D mask too narrow": (
        {"attention_mask": torch.ones(2, 1, 5, 4, dtype=torch.bool)},
        r"attention_mask: has shape \[2, 1, 5, 4\]: it must be \[2 or 1, 3 or 1, 5, 5\]",
    ),
    "4-D mask of heads": (
        {"attention_mask": torch.ones(2, 2, 5, 5, dtype=torch.bool)},
        r"\[2 or 1, 3 or 1, 5, 5\]",
    ),
    "4-D mask of integers": (
        {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.int64)},
        "attention_mask: is torch.int64: a 4-D mask is bool",
    ),
    "dict without a kind": (
        {"attention_mask": {"full_attention": None}},
        "attention_mask: a dict with .*full_attention.*: it must have",
    ),
    "dict of 2-D masks": (
        {"attention_mask": {"full_attention": None, "sliding_attention": torch.ones(2, 5)}},
        r'attention_mask\["sliding_attention"\]: has shape \[2, 5\]',
    ),
    "positions of another shape": (
        {"position_ids": torch.arange(4)[None]},
        r"position_ids: has shape \[1, 4\]: it must be \[2, 5\] or \[1, 5\]",
    ),
    "float positions": ({"position_ids": torch.zeros(2, 5)}, "position_ids: is torch.float32"),
    "bounds that fall": ({"cu_seqlens": torch.tensor([0, 5, 3, 10])}, "cu_seqlens: is"),
    "bounds that stop early": ({"cu_seqlens": torch.tensor([0, 5, 9])}, "must rise from 0 to 10"),
    "a document over two rows": ({"cu_seqlens": torch.tensor([0, 3, 10])}, "so 5 must be in it"),
    "float bounds": ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "cu_seqlens: is torch.float32"),
    "a cache of another library": ({"past_key_values": ((1, 2),)}, "past_key_values: is a tuple"),
    "cache_position": ({"cache_position": torch.arange(1, 6)}, "cache_position: is"),
}


@pytest.mark.filterwarnings("ignore:gemma2")
@pytest.mark.parametrize("case", BAD)
@torch.no_grad()
def test_malformed_calls_are_refused_by_the_arguments_name(case: str) -> None:
    inputs, error = BAD[case]
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError), match=error):
        model_of().model(**{"input_ids": GOOD, **inputs})


@torch.no_grad()
def test_a_mask_that_disagrees_with_the_cache_is_refused() -> None:
    cache = new_cache(2)
    model_of()(GOOD, past_key_values=cache)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 2] = 0
    with pytest.raises(ValueError, match=r"row 1 has 4 tokens before .* the cache has 5"):
        model_of()(GOOD[:, :1], attention_mask=mask, past_key_values=cache)
    assert cache.lengths.tolist() == [5, 5]


def test_only_the_reference_path_warns() -> None:
    ids, mask = F.padded([F.tokens(1, 9)[0], F.tokens(1, 4)[0]], "left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(ids, attention_mask=mask)
        logits_of(ids, cu_seqlens=torch.tensor([0, 9, 18]))
