"""transformers' own Gemma 2 on our kernels gives what it does with eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from tests.integrations.transformers.twins import (
    EDGES,
    PUBLISHED,
    WINDOW,
    compare,
    config,
    model,
)
from tests.model import factories as F
from tests.model import plain
from tests.model.test_against_transformers import mean_error


@pytest.mark.parametrize("shape", PUBLISHED)
@torch.no_grad()
def test_logits_equal_float64_around_the_window(shape: str, matrices: list[Tensor]) -> None:
    for length in EDGES:
        compare(shape, F.tokens(2, length))
    assert not matrices, "a matrix [S, S] was made"


@torch.no_grad()
def test_the_cap_is_honoured() -> None:
    ids = F.tokens(2, 2 * WINDOW + 3)
    without = F.twin(config(attn_logit_softcapping=None), attention="gemma2")(ids).logits
    exact = plain.forward(F.state_dict(config()), config(attn_logit_softcapping=None), ids).logits
    assert F.relative_error(without, exact) < 1e-5
    assert F.relative_error(model("gemma2")(ids).logits, exact) > 0.3


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
