"""What masks say reaches our attention: padding, packed documents, matrices, functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from gemma2.integrations.transformers import HybridCache, attention_mask
from gemma2.integrations.transformers.call import Rows
from tests.integrations.transformers.twins import PUBLISHED, WINDOW, compare, model, truth
from tests.model import factories as F


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


@pytest.mark.parametrize("given", [0, WINDOW + 1])
def test_rows_of_layers_of_another_kind_are_refused(given: int) -> None:
    function = masking_utils.causal_mask_function
    if given:
        function = masking_utils.sliding_window_causal_mask_function(given)
    rows = attention_mask(1, torch.arange(5), 5, mask_function=function, local_size=given or None)
    assert isinstance(rows, Rows)
    masks = {"full_attention": rows, "sliding_attention": rows}
    with pytest.raises(ValueError, match=f"for layers with a window of {given}, this one has"):
        model("gemma2")(F.tokens(1, 5), attention_mask=masks)


def but(hidden: int, b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    """Causality, and a column that only itself sees."""
    return (k <= q) & ((k != hidden) | (q == hidden))


def closure(first: int) -> Callable[..., Tensor]:
    return lambda b, h, q, k: (k != first) | (q == first)


OWN: dict[str, dict[str, Callable[..., Any]]] = {
    "more": {"or_mask_function": lambda b, h, q, k: (q < 4) & (k < 4)},
    "less": {"and_mask_function": lambda b, h, q, k: (k != 2) | (q == 2)},
    "less, by a closure": {"and_mask_function": closure(2)},
}


def made(kind: str, cache: Any = None, **functions: Callable[..., Any]) -> Any:
    """What transformers makes of a mask function of the caller's for 9 columns."""
    gemma = model("gemma2")
    embedded = gemma.get_input_embeddings()(F.tokens(1, 9))
    names: dict[str, Any] = {"inputs_embeds": embedded, "cache": cache}
    if transformers.__version__ < "5":
        names = {"input_embeds": embedded, "past_key_values": cache}
        names["cache_position"] = torch.arange(9)
    make = getattr(masking_utils, f"create_{kind}")
    return make(config=gemma.config, attention_mask=None, **functions, **names)


@pytest.mark.parametrize("how", sorted(OWN))
@torch.no_grad()
def test_mask_functions_of_the_callers_own_go_to_the_reference(how: str) -> None:
    q, k = torch.arange(9)[:, None], torch.arange(9)[None]
    own = next(iter(OWN[how].values()))(0, 0, q, k)
    for kind, window in (("causal_mask", 9), ("sliding_window_causal_mask", WINDOW)):
        mask = made(kind, **OWN[how])
        assert isinstance(mask, Tensor)
        usual = (k <= q) & (k > q - window)
        assert torch.equal(mask[0, 0], usual | own if how == "more" else usual & own)


@pytest.mark.parametrize("how", sorted(OWN))
@torch.no_grad()
def test_mask_functions_of_the_callers_own_are_refused_by_our_cache(how: str) -> None:
    cache = HybridCache(model("gemma2").config)
    with pytest.raises(ValueError, match="knows causal masks with padding only"):
        made("causal_mask", cache, **OWN[how])
    assert cache.get_seq_length() == 0


# mask function, window of the layers
UNKNOWN: dict[str, tuple[Callable[..., Any], int | None]] = {
    "the caller's": (lambda b, h, q, k: (k <= q) & (k != 3), None),
    "the caller's, an object": (functools.partial(but, 3), None),
    "no causality": (masking_utils.sliding_window_overlay(WINDOW), WINDOW),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=int)), None),
    "another window": (masking_utils.sliding_window_causal_mask_function(5), WINDOW),
    "a window where there is none": (masking_utils.sliding_window_causal_mask_function(5), None),
    "no window where there is one": (masking_utils.causal_mask_function, WINDOW),
}


@pytest.mark.parametrize("which", sorted(UNKNOWN))
def test_a_mask_function_that_says_something_else_becomes_a_matrix(which: str) -> None:
    function, window = UNKNOWN[which]
    call: dict[str, Any] = {"q_length": 9, "device": "cpu"}
    if transformers.__version__ < "5":
        call = {"cache_position": torch.arange(9)}
    mask = attention_mask(1, kv_length=9, mask_function=function, local_size=window, **call)
    assert isinstance(mask, Tensor), "taken for causality and the window"
    q, k = torch.arange(9)[:, None], torch.arange(9)[None]
    row = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(mask[0, 0], function(row, row, q, k))
