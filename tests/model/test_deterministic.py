"""In deterministic mode a row's bits depend on the row alone: neither on its batch nor on how it is read."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from gemma2 import HybridCache
from tests.model.factories import lively, padded, tokens

# Rings of the sliding layers have 128 slots.
LENGTHS = (150, 3, 70)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request):
    return copy.deepcopy(lively("three")).to(request.param)  # that one is shared


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_row_in_a_padded_batch_has_the_bits_of_the_row_alone(model, side):
    rows = [tokens(1, n, seed=n)[0] for n in LENGTHS]
    ids, mask = padded(rows, side)
    together = model(ids, attention_mask=mask).logits
    for row, logits, real in zip(rows, together, mask.bool(), strict=True):
        assert torch.equal(logits[real], model(row[None]).logits[0])


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@torch.inference_mode()
def test_a_text_read_in_chunks_has_the_bits_of_the_text_read_at_once(model, chunk):
    ids = tokens(1, 150)
    cache = HybridCache(model.config, 1, 150)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(chunk, dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), model(ids).logits)
