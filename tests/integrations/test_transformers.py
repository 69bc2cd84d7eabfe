"""transformers' own Gemma 2 on our kernels and with our cache, against its eager attention.

`test_all_of_this_holds_with_transformers_5` runs this file again where transformers 5 is installed.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gemma2
from gemma2.integrations import transformers as integration
from gemma2.integrations.transformers import HybridCache
from tests.model import factories as F
from tests.model import plain
from tests.model.test_against_transformers import assert_within, mean_error

PUBLISHED = ["2b", "9b", "27b"]
WINDOW = F.SMALL["sliding_window"]
EDGES = [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3]
# transformers 5 wants hidden_size to be a multiple of the number of heads
HIDDEN = {"2b": 72, "9b": 64, "27b": 80}

transformers.logging.set_verbosity_error()


@functools.lru_cache(maxsize=64)
def model(
    attention: str, shape: str = "27b", kind: str = "causal", dtype: torch.dtype = torch.float32
) -> Any:
    """A model of transformers. Cached between tests: do not train it or change its weights."""
    return F.twin(config(shape), kind, dtype, attention=attention)


def config(shape: str = "27b", **overrides: Any) -> Any:
    return F.config(shape, **{"hidden_size": HIDDEN[shape], **overrides})


@functools.lru_cache(maxsize=2)
def lively(attention: str) -> Any:
    """A model whose text depends on all of the text before."""
    ours = F.lively("27b")
    return F.twin(ours.config, attention=attention, state=dict(ours.state_dict()))


def truth(shape: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Logits in float64."""
    cfg = config(shape)
    return plain.forward(F.state_dict(cfg), cfg, ids, mask, **options).logits


def compare(shape: str, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> None:
    """Our logits of real tokens are as exact as eager's."""
    outputs = [
        model(name, shape)(ids, attention_mask=mask, **inputs).logits
        for name in ("gemma2", "eager")
    ]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    ours, theirs, exact = (x[real] for x in (*outputs, truth(shape, ids, mask)))
    assert_within(ours, theirs, exact, "logits")


@pytest.fixture
def matrices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that went to the reference; a test asserts that there were none, or some."""
    seen: list[Tensor] = []
    usual = integration._attend_by_matrix

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: Any) -> Any:
        seen.append(mask)
        return usual(query, key, value, mask, *rest)

    monkeypatch.setattr(integration, "_attend_by_matrix", watched)
    return seen


# ---- one call -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", PUBLISHED)
@torch.no_grad()
def test_logits_equal_float64_around_the_window(shape: str, matrices: list[Tensor]) -> None:
    for length in EDGES:
        compare(shape, F.tokens(2, length))
    assert not matrices, "a matrix [S, S] was made"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", PUBLISHED)
@torch.no_grad()
def test_padded_rows_equal_float64(shape: str, side: str, matrices: list[Tensor]) -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 3, 12)], side)
    compare(shape, ids, mask)
    compare(shape, ids, mask, use_cache=False)
    assert not matrices, "a matrix [S, S] was made"


@torch.no_grad()
def test_padding_between_tokens_equals_eager_and_is_said(matrices: list[Tensor]) -> None:
    ids, mask = F.tokens(2, 2 * WINDOW + 3), torch.ones(2, 2 * WINDOW + 3, dtype=torch.long)
    mask[0, 4:7] = 0
    theirs = model("eager")(ids, attention_mask=mask).logits
    with pytest.warns(UserWarning, match="reference attention"):
        ours = model("gemma2")(ids, attention_mask=mask).logits
    assert F.relative_error(ours[mask.bool()], theirs[mask.bool()]) < 1e-5
    assert matrices


@torch.no_grad()
def test_the_cap_is_honoured() -> None:
    ids = F.tokens(2, 2 * WINDOW + 3)
    without = F.twin(config(attn_logit_softcapping=None), attention="gemma2")(ids).logits
    exact = plain.forward(F.state_dict(config()), config(attn_logit_softcapping=None), ids).logits
    assert F.relative_error(without, exact) < 1e-5
    assert F.relative_error(model("gemma2")(ids).logits, exact) > 0.3


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(use_cache: bool, matrices: list[Tensor]) -> None:
    documents = [F.tokens(1, n, n) for n in (9, 1, 12)]
    ids = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = model("gemma2")(ids, position_ids=position_ids, use_cache=use_cache).logits
    alone = torch.cat([truth("27b", d) for d in documents], dim=1)
    if use_cache:  # transformers looks for documents only where there is no cache
        theirs = model("eager")(ids, position_ids=position_ids, use_cache=True).logits
        assert F.relative_error(theirs, alone) > 0.1
        assert F.relative_error(packed, theirs) < 1e-5
    else:
        assert F.relative_error(packed, alone) < 1e-5
    assert not matrices, "a matrix [S, S] was made"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", PUBLISHED)
@torch.no_grad()
def test_16_bit_error_is_no_worse_than_eager(shape: str, dtype: torch.dtype) -> None:
    errors = {"gemma2": 0.0, "eager": 0.0}
    cfg = config(shape)
    for seed in range(4):
        ids = F.tokens(2, 2 * WINDOW + 3, seed)
        exact = plain.forward(F.state_dict(cfg), cfg, ids, dtype=dtype).logits
        for name in errors:
            logits = model(name, shape, dtype=dtype)(ids).logits
            assert logits.dtype == dtype
            errors[name] += mean_error(logits, exact)
    # everything but attention is the same code
    assert errors["gemma2"] <= 1.02 * errors["eager"], errors


@pytest.mark.parametrize("form", ["bool", "additive", "dict"])
@torch.no_grad()
def test_a_4d_mask_is_used_verbatim(form: str) -> None:
    ids = F.tokens(2, 2 * WINDOW + 3)
    n = ids.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[:, 3:5] &= torch.eye(n, dtype=torch.bool)[:, 3:5]  # nobody else sees tokens 3 and 4
    additive = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
    given: Any = {"bool": seen[None, None], "additive": additive}.get(form)
    if form == "dict":
        given = {"full_attention": additive, "sliding_attention": additive[0][None]}
        theirs = model("eager")(ids, attention_mask=given).logits
    else:
        theirs = model("eager")(ids, attention_mask=additive).logits
    with pytest.warns(UserWarning, match="reference attention"):
        ours = model("gemma2")(ids, attention_mask=given).logits
    assert F.relative_error(ours, theirs) < 1e-5
    assert F.relative_error(ours, truth("27b", ids)) > 0.1, "the mask did nothing"


@torch.no_grad()
def test_attentions_are_eagers_and_said_to_be_slow() -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 5)], "right")
    theirs = model("eager")(ids, attention_mask=mask, output_attentions=True)
    with pytest.warns(UserWarning, match="output_attentions run through the reference"):
        ours = model("gemma2")(ids, attention_mask=mask, output_attentions=True)
    assert len(ours.attentions) == config().num_hidden_layers
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        real = mask.bool()[:, None, :, None].expand_as(a)
        assert torch.allclose(a[real], b[real], atol=1e-6)
    assert F.relative_error(ours.logits[mask.bool()], theirs.logits[mask.bool()]) < 1e-5


@torch.no_grad()
def test_a_head_dim_without_kernel_runs_through_the_reference() -> None:
    cfg = config(head_dim=32, query_pre_attn_scalar=32)
    ids = F.tokens(2, 2 * WINDOW + 3)
    ours = F.twin(cfg, attention="gemma2")(ids).logits
    assert F.relative_error(ours, F.twin(cfg)(ids).logits) < 1e-5


@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classifiers_equal_eager(kind: str, side: str) -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 4)], side)
    ours, theirs = (
        model(name, kind=kind)(ids, attention_mask=mask).logits for name in ("gemma2", "eager")
    )
    if kind == "token":
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert F.relative_error(ours, theirs) < 1e-5


# ---- caches -------------------------------------------------------------------------------------

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
    usual = integration.ops.attention
    monkeypatch.setattr(
        integration.ops, "attention", lambda q, k, *a, **o: read.append(k) or usual(q, k, *a, **o)
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


# ---- generation ---------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def generate(attention: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    gemma = lively(attention)
    mask = torch.ones_like(ids) if mask is None else mask
    if options.pop("ours", False):
        options["past_key_values"] = HybridCache(gemma.config)
    return gemma.generate(ids, attention_mask=mask, **{**GREEDY, **options})


@pytest.mark.parametrize("ours", [False, True], ids=["their cache", "our cache"])
@pytest.mark.parametrize("how", ["greedy", "beams", "sampled", "chunked prefill"])
def test_generated_tokens_equal_eagers(how: str, ours: bool) -> None:
    options: dict[str, Any] = {
        "greedy": {"max_new_tokens": 40},
        "beams": {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2},
        "sampled": {"max_new_tokens": 12, "do_sample": True, "top_k": 5},
        "chunked prefill": {"max_new_tokens": 12, "prefill_chunk_size": 5},
    }[how]
    rows = [F.tokens(1, n, n)[0] for n in (130, 115, 128)]  # a ring of 128 wraps
    ids, mask = F.padded(rows[:1] if how == "chunked prefill" else rows, "left")
    made = []
    for attention, cache in (("eager", False), ("gemma2", ours)):
        torch.manual_seed(0)
        made.append(generate(attention, ids, mask, ours=cache, **options))
    assert torch.equal(*made)
    assert len(set(made[0][0, ids.shape[1] :].tolist())) > 5, "a text that says nothing"


def test_static_cache_generates_what_eager_does() -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (21, 3)], "left")
    options: dict[str, Any] = {"max_new_tokens": 12, "cache_implementation": "static"}
    want = generate("eager", ids, mask, max_new_tokens=12)
    assert torch.equal(generate("gemma2", ids, mask, **options), want)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_drafted_tokens_leave_the_text_as_it_is_past_the_window(how: str) -> None:
    ids = F.tokens(1, 120).repeat(1, 2)  # of which lookup finds something
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if how == "assistant":
        options = {"assistant_model": model("gemma2", "27b")}
    want = generate("eager", ids, max_new_tokens=16)
    assert torch.equal(generate("gemma2", ids, max_new_tokens=16, ours=True, **options), want)


def test_a_conversation_goes_on_in_our_cache() -> None:
    cache = HybridCache(lively("gemma2").config)
    first = generate("gemma2", F.tokens(1, 15), max_new_tokens=10, past_key_values=cache)
    assert cache.get_seq_length() == 24
    more = torch.cat([first, F.tokens(1, 6, 7)], dim=1)
    second = generate("gemma2", more, max_new_tokens=10, past_key_values=cache)
    assert torch.equal(second, generate("eager", more, max_new_tokens=10))


# ---- training -----------------------------------------------------------------------------------


def gradients(gemma: Any, **inputs: Any) -> dict[str, Tensor]:
    gemma.train()
    gemma(**inputs).loss.backward()
    return {k: v.grad for k, v in gemma.named_parameters() if v.grad is not None}


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_gradients_equal_eagers(side: str) -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 7)], side)
    # a pad's guess at the first token is nobody's: eager gives a mean of the keys it may not see
    guessed = (mask == 0) | (mask.cumsum(1) == 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(guessed, -100)}
    if side == "packed":
        ids = ids[:1]
        position_ids = torch.cat([torch.arange(8), torch.arange(ids.shape[1] - 8)])[None]
        inputs = {"input_ids": ids, "position_ids": position_ids, "labels": ids}
    ours, theirs = (
        gradients(F.twin(config(), attention=a), use_cache=False, **inputs)
        for a in ("gemma2", "eager")
    )
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < 2e-5, f"{name}: {error:.1e}"


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = F.tokens(2, 2 * WINDOW + 3)
    usual = gradients(F.twin(config(), attention="gemma2"), input_ids=ids, labels=ids)
    gemma = F.twin(config(), attention="gemma2")
    gemma.gradient_checkpointing_enable()
    again = gradients(gemma, input_ids=ids, labels=ids)
    for name, gradient in usual.items():
        assert torch.equal(again[name], gradient), name


@torch.no_grad()
def test_compiled_calls_equal_eager() -> None:
    gemma = F.twin(config(), attention="gemma2")
    run = torch.compile(gemma, fullgraph=True, backend="aot_eager")
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (2 * WINDOW + 3, 7)], "left")
    real = mask.bool()
    logits = run(ids, attention_mask=mask, use_cache=False).logits
    assert F.relative_error(logits[real], truth("27b", ids, mask)[real]) < 1e-5
    n = ids.shape[1]
    position_ids = torch.cat([torch.arange(8), torch.arange(n - 8)])[None]
    logits = run(ids[:1], position_ids=position_ids, use_cache=False).logits
    apart = [truth("27b", part) for part in (ids[:1, :8], ids[:1, 8:])]
    assert F.relative_error(logits, torch.cat(apart, dim=1)) < 1e-5
    holes = mask.clone()
    holes[0, 5] = 0
    with pytest.raises(RuntimeError, match="padding between real tokens"):
        run(ids, attention_mask=holes, use_cache=False)


# ---- pipelines ----------------------------------------------------------------------------------


def tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(gemma2.tiny.path() / "tokenizer.json"), pad_token="<pad>"
    )


def test_pipelines_run_through_our_attention(tmp_path: Path) -> None:
    texts = ["dog:", "a domestic animal that barks at whoever comes to the door of the house:"]
    gemma2.tiny.load_sequence_classifier(torch.float32).save_pretrained(tmp_path)
    written, sorted_ = {}, {}
    for attention in ("eager", "gemma2"):
        options = {"attn_implementation": attention, "dtype": torch.float32}
        writer = transformers.AutoModelForCausalLM.from_pretrained(gemma2.tiny.path(), **options)
        assert writer.config._attn_implementation == attention
        tell = transformers.pipeline(
            "text-generation", model=writer, tokenizer=tokenizer(), device="cpu", batch_size=2
        )
        tell.tokenizer.padding_side = "left"
        said = tell(texts, max_new_tokens=8, do_sample=False)
        written[attention] = [one[0]["generated_text"] for one in said]
        sorter = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, **options
        )
        sorter.config.pad_token_id = 0
        sort = transformers.pipeline(
            "text-classification", model=sorter, tokenizer=tokenizer(), device="cpu", batch_size=2
        )
        sorted_[attention] = sort(texts)
    assert written["gemma2"] == written["eager"]
    assert all(said.startswith(text) for said, text in zip(written["eager"], texts, strict=True))
    for ours, theirs in zip(sorted_["gemma2"], sorted_["eager"], strict=True):
        assert ours["label"] == theirs["label"]
        assert abs(ours["score"] - theirs["score"]) < 1e-5


# ---- wrong use ----------------------------------------------------------------------------------


def test_another_model_is_refused() -> None:
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            attn_implementation="gemma2",
        )
    )
    with pytest.raises(ValueError, match='serves Gemma 2 models, this is "llama"'):
        llama(F.tokens(1, 5))
    with pytest.raises(ValueError, match='serves Gemma 2 models, this is "llama"'):
        llama(F.tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())


def test_dropout_in_training_is_refused() -> None:
    gemma = F.twin(config(attention_dropout=0.0), attention="gemma2")
    for layer in gemma.model.layers:
        layer.self_attn.attention_dropout = 0.1
    gemma(F.tokens(1, 5))  # none in eval mode
    gemma.train()
    with pytest.raises(ValueError, match=r"attention_dropout: is 0\.1"):
        gemma(F.tokens(1, 5))


def test_a_call_without_a_mask_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="a NoneType has come"):
        model("gemma2")(
            F.tokens(1, 5), attention_mask={"full_attention": None, "sliding_attention": None}
        )
    masks = {
        kind: torch.ones(1, 1, 5, 9, dtype=torch.bool)
        for kind in ("full_attention", "sliding_attention")
    }
    with pytest.raises(ValueError, match=r"has shape \[1, 1, 5, 9\]: this layer needs"):
        model("gemma2")(F.tokens(1, 5), attention_mask=masks)


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


def closure(first: int) -> Callable[..., Tensor]:
    return lambda b, h, q, k: (k != first) | (q == first)


OWN: dict[str, dict[str, Callable[..., Any]]] = {
    "more": {"or_mask_function": lambda b, h, q, k: (q < 4) & (k < 4)},
    "less": {"and_mask_function": lambda b, h, q, k: (k != 2) | (q == 2)},
    "less, by a closure": {"and_mask_function": closure(2)},
}


@pytest.mark.parametrize("how", sorted(OWN))
@torch.no_grad()
def test_mask_functions_of_the_callers_own_go_to_the_reference(how: str) -> None:
    from transformers import masking_utils

    gemma = model("gemma2")
    embedded = gemma.get_input_embeddings()(F.tokens(1, 9))
    names: dict[str, Any] = {"inputs_embeds": embedded, "cache": None}
    if transformers.__version__ < "5":
        names = {"input_embeds": embedded, "past_key_values": None}
        names["cache_position"] = torch.arange(9)
    index = torch.arange(9)
    q, k = index[:, None], index[None]
    own = next(iter(OWN[how].values()))(0, 0, q, k)
    for kind, window in (("causal_mask", 9), ("sliding_window_causal_mask", WINDOW)):
        make = getattr(masking_utils, f"create_{kind}")
        mask = make(config=gemma.config, attention_mask=None, **OWN[how], **names)
        assert isinstance(mask, Tensor)
        usual = (k <= q) & (k > q - window)
        assert torch.equal(mask[0, 0], usual | own if how == "more" else usual & own)


# ---- installations ------------------------------------------------------------------------------


def test_without_transformers_the_import_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import gemma2\n"
        "try: import gemma2.integrations.transformers\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs transformers 4.57 or newer" in done.stdout, done.stderr
    assert "gemma2[transformers]" in done.stdout


@pytest.mark.slow
def test_all_of_this_holds_with_transformers_5() -> None:
    if transformers.__version__ >= "5":
        return  # this is that run
    place = os.environ.get("GEMMA2_TEST_TRANSFORMERS5")
    if not place:
        pytest.skip("GEMMA2_TEST_TRANSFORMERS5 names no folder with transformers 5")
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, __file__],
        env=dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE="1"),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
