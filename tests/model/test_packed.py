"""Packed documents: several texts in one row that must not know of each other.

transformers 5 leaks between them in train(), axolotl#2449 between all of them; here in train and in
eval, with and without a cache, changing one document leaves the others' outputs bit-identical.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from tests.model import factories as F
from tests.model import plain

LENGTHS = [7, 1, 12, 20]  # shorter and longer than the window of 8, and a document of one token
BOUNDS = [0, 7, 8, 20, 40]
TOLERANCE = 1e-5


def spans() -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(BOUNDS)]


def documents_of(ids: Tensor) -> list[Tensor]:
    return [ids[:, span] for span in spans()]


def cu_seqlens(rows: int = 1) -> Tensor:
    """Bounds over the columns of all rows."""
    total = BOUNDS[-1]
    return torch.tensor([0] + [r * total + b for r in range(rows) for b in BOUNDS[1:]])


def restarting(rows: int = 1) -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(rows, -1)


WAYS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "cu_seqlens": lambda rows: {"cu_seqlens": cu_seqlens(rows)},
    "cu_seqlens_int32": lambda rows: {"cu_seqlens": cu_seqlens(rows).int()},
    "position_ids": lambda rows: {"position_ids": restarting(rows)},
    "both": lambda rows: {"cu_seqlens": cu_seqlens(rows), "position_ids": restarting(rows)},
}
WAY = pytest.mark.parametrize("way", sorted(WAYS))
SHAPE = pytest.mark.parametrize("shape", ["2b", "27b", "three"])


def cache_for(model: Any, rows: int) -> Any:
    return gemma2.HybridCache(model.config, rows, 512)


@WAY
@SHAPE
@torch.no_grad()
def test_packed_equals_each_document_alone(shape: str, way: str) -> None:
    model, ids = F.tiny(shape), F.tokens(2, BOUNDS[-1])
    packed = model(ids, **WAYS[way](2)).logits
    config = F.config(shape)
    for span in spans():
        alone = plain.forward(F.state_dict(config), config, ids[:, span]).logits
        error = F.relative_error(packed[:, span], alone)
        assert error < TOLERANCE, f"document {span}: {error:.1e}"
    whole = model(ids).logits
    assert F.relative_error(whole[:, 8:], packed[:, 8:].double()) > 0.1, "nothing was isolated"


@WAY
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_changing_one_document_leaves_the_others_bit_identical(
    way: str, training: bool, cached: bool
) -> None:
    model = F.build(F.config("2b"))
    model.train(training)
    ids = F.tokens(2, BOUNDS[-1])

    def run(ids: Tensor) -> Tensor:
        cache = cache_for(model, 2) if cached else None
        return model(ids, past_key_values=cache, **WAYS[way](2)).logits.detach()

    before = run(ids)
    for changed in spans():
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 11) % 90 + 3
        after = run(other)
        assert not torch.equal(after[:, changed], before[:, changed])
        for span in spans():
            if span != changed:
                assert torch.equal(after[:, span], before[:, span]), f"{changed} leaks to {span}"


@WAY
def test_gradients_are_the_sum_of_those_of_each_document(way: str) -> None:
    config, ids = F.config("27b"), F.tokens(1, BOUNDS[-1])
    labels = ids.clone()
    for bound in BOUNDS[:-1]:
        labels[:, bound] = -100  # the first token of a document is predicted by another one
    state = {k: v.double().requires_grad_() for k, v in F.state_dict(config).items()}
    total = torch.zeros((), dtype=torch.float64)
    for span in spans():
        logits = plain.forward(state, config, ids[:, span]).logits[0, :-1]
        log_p = torch.log_softmax(logits, -1)
        total = total - log_p.gather(-1, ids[0, span][1:, None]).sum()
    total.backward()
    model = F.build(config).train()
    model(ids, labels=labels, num_items_in_batch=1, **WAYS[way](1)).loss.backward()
    for name, parameter in model.named_parameters():
        want = state[name].grad
        error = float((parameter.grad.double() - want).norm() / want.norm())
        assert error < 2e-5, f"gradient of {name}: {error:.1e}"


@WAY
def test_no_gradient_flows_into_another_document(way: str) -> None:
    model = F.build(F.config("three")).train()
    ids = F.tokens(1, BOUNDS[-1])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **WAYS[way](1)).logits
    logits[:, spans()[2]].square().sum().backward()
    for span in spans():
        flows = float(embeds.grad[:, span].abs().sum())
        assert (flows > 0) == (span == spans()[2]), f"{span}: {flows}"


@torch.no_grad()
def test_gradient_checkpointing_and_deterministic_mode_isolate_too() -> None:
    ids = F.tokens(1, BOUNDS[-1])
    usual = F.tiny("three")(ids, cu_seqlens=cu_seqlens()).logits
    torch.use_deterministic_algorithms(True)
    model = F.build(F.config("three")).train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad():
        trained = model(ids, cu_seqlens=cu_seqlens()).logits
    assert F.relative_error(trained.detach(), usual.double()) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 5, 9, 40])
@torch.no_grad()
def test_chunks_through_a_cache_isolate_by_position_ids(chunk: int) -> None:
    model, ids = F.tiny("2b"), F.tokens(2, BOUNDS[-1])
    want = model(ids, position_ids=restarting(2)).logits
    cache = cache_for(model, 2)
    parts = [
        model(
            ids[:, s : s + chunk],
            position_ids=restarting(2)[:, s : s + chunk],
            past_key_values=cache,
        ).logits
        for s in range(0, BOUNDS[-1], chunk)
    ]
    assert F.relative_error(torch.cat(parts, 1), want.double()) < TOLERANCE
    assert cache.get_seq_length() == BOUNDS[-1]


@WAY
@torch.no_grad()
def test_decoding_goes_on_in_the_last_document(way: str) -> None:
    config, model, ids = F.config("27b"), F.tiny("27b"), F.tokens(2, BOUNDS[-1] + 5)
    cache = cache_for(model, 2)
    model(ids[:, : BOUNDS[-1]], past_key_values=cache, **WAYS[way](2))
    state = F.state_dict(config)
    last = ids[:, BOUNDS[-2] :]
    want = plain.forward(state, config, last).logits[:, LENGTHS[-1] :]
    for n in range(5):
        # neither position_ids nor bounds: the cache knows
        out = model(ids[:, BOUNDS[-1] + n, None], past_key_values=cache).logits
        assert F.relative_error(out, want[:, n : n + 1]) < TOLERANCE, f"token {n}"


@torch.no_grad()
def test_a_crop_into_an_earlier_document_goes_on_in_that_one() -> None:
    config, model, ids = F.config("three"), F.tiny("three"), F.tokens(1, BOUNDS[-1] + 3)
    cache = cache_for(model, 1)
    model(ids[:, : BOUNDS[-1]], past_key_values=cache, cu_seqlens=cu_seqlens())
    cache.crop(15)  # in the third document, seven tokens of it
    new = ids[:, -3:]
    text = torch.cat([ids[:, 8:15], new], dim=1)
    want = plain.forward(F.state_dict(config), config, text).logits[:, -3:]
    out = model(new, past_key_values=cache).logits
    assert F.relative_error(out, want) < TOLERANCE


@torch.no_grad()
def test_a_cache_emptied_by_a_crop_starts_again_without_documents() -> None:
    # found by test_cache_machine: two rows, documents remembered, nothing stored
    model, ids = F.tiny("three"), F.tokens(2, BOUNDS[-1])
    cache = cache_for(model, 2)
    model(ids, past_key_values=cache, cu_seqlens=cu_seqlens(2))
    cache.crop(0)
    config, new = F.config("three"), F.tokens(2, 12, 5)
    want = plain.forward(F.state_dict(config), config, new).logits
    got = [model(part, past_key_values=cache).logits for part in new.split([9, 3], dim=1)]
    assert F.relative_error(torch.cat(got, 1), want) < TOLERANCE


@torch.no_grad()
def test_rows_may_be_cut_differently() -> None:
    config, model, ids = F.config("2b"), F.tiny("2b"), F.tokens(2, 20)
    bounds = torch.tensor([0, 4, 20, 20 + 13, 40])
    out = model(ids, cu_seqlens=bounds).logits
    state = F.state_dict(config)
    for row, span in ((0, slice(0, 4)), (0, slice(4, 20)), (1, slice(0, 13)), (1, slice(13, 20))):
        want = plain.forward(state, config, ids[row, span][None]).logits[0]
        assert F.relative_error(out[row, span], want) < TOLERANCE, (row, span)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_beside_packed_documents(side: str) -> None:
    config, model = F.config("three"), F.tiny("three")
    rows = [F.tokens(1, 14, 1)[0], F.tokens(1, 9, 2)[0]]
    ids, mask = F.padded(rows, side)
    positions = [torch.cat([torch.arange(6), torch.arange(8)]), torch.arange(9)]
    position_ids, _ = F.padded(positions, side, pad=1)  # as transformers fills padded columns
    out = model(ids, attention_mask=mask, position_ids=position_ids).logits
    state = F.state_dict(config)
    first = torch.cat(
        [plain.forward(state, config, rows[0][None, s]).logits[0] for s in (slice(6), slice(6, 14))]
    )
    second = plain.forward(state, config, rows[1][None]).logits[0]
    assert F.relative_error(out[0, mask[0].bool()], first) < TOLERANCE
    assert F.relative_error(out[1, mask[1].bool()], second) < TOLERANCE


@torch.no_grad()
def test_attentions_of_packed_documents_are_zero_across_bounds() -> None:
    ids = F.tokens(1, BOUNDS[-1])
    out = F.tiny("three")(ids, cu_seqlens=cu_seqlens(), output_attentions=True)
    number = torch.bucketize(torch.arange(BOUNDS[-1]), torch.tensor(BOUNDS[1:]), right=True)
    apart = number[:, None] != number[None, :]
    for weights in out.attentions:
        assert float(weights[..., apart].abs().max()) == 0
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert (
        F.relative_error(out.logits, F.tiny("three")(ids, cu_seqlens=cu_seqlens()).logits.double())
        < TOLERANCE
    )
