"""transformers' own Gemma 2 with random weights, on our kernels and with its eager attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor

import gemma2.integrations.transformers  # noqa: F401  (registers "gemma2")
from tests.model import factories as F
from tests.model import plain
from tests.model.test_against_transformers import assert_within

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
