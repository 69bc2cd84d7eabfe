"""Tiny random models built like 2B, 9B and 27B, and their twins in transformers.

Weights are such that the peculiarities show: attention scores reach several times the cap, logits
about the cap, norm weights are not zero, and every weight is a bfloat16 number, so that the same
model exists in bfloat16, float32 and float64 without a rounding between them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import gemma2
from gemma2 import Gemma2Config

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 8.0,
    "classifier_dropout": 0.0,
}

# name -> what differs from SMALL
SHAPES: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "9b": {
        "hidden_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "27b": {
        "hidden_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
    "three": {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "query_pre_attn_scalar": 50,
    },
    "single": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
}
HEADS = {
    "causal": "Gemma2ForCausalLM",
    "sequence": "Gemma2ForSequenceClassification",
    "token": "Gemma2ForTokenClassification",
}


def config(shape: str = "three", **overrides: Any) -> Gemma2Config:
    return Gemma2Config(**{**SMALL, **SHAPES[shape], **overrides})


def state_dict(config: Gemma2Config, kind: str = "causal", seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights that are bfloat16 numbers, by the hub's keys; lm_head is tied and absent."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).bfloat16().float()

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    # (q . k) * scale has a standard deviation of about 3 caps
    cap = config.attn_logit_softcapping or 2.0
    entry = math.sqrt(3 * cap * math.sqrt(config.query_pre_attn_scalar / config.head_dim))
    qk = entry / math.sqrt(hidden)
    logits_cap = config.final_logit_softcapping or 8.0
    out = {
        "model.embed_tokens.weight": draw(
            config.vocab_size, hidden, std=logits_cap / math.sqrt(hidden)
        )
    }
    for n in range(config.num_hidden_layers):
        for name, shape, std in (
            ("self_attn.q_proj", (q_size, hidden), qk),
            ("self_attn.k_proj", (kv_size, hidden), qk),
            ("self_attn.v_proj", (kv_size, hidden), hidden**-0.5),
            ("self_attn.o_proj", (hidden, q_size), q_size**-0.5),
            ("mlp.gate_proj", (inner, hidden), hidden**-0.5),
            ("mlp.up_proj", (inner, hidden), hidden**-0.5),
            ("mlp.down_proj", (hidden, inner), inner**-0.5),
            ("input_layernorm", (hidden,), 0.3),
            ("post_attention_layernorm", (hidden,), 0.3),
            ("pre_feedforward_layernorm", (hidden,), 0.3),
            ("post_feedforward_layernorm", (hidden,), 0.3),
        ):
            out[f"model.layers.{n}.{name}.weight"] = draw(*shape, std=std)
    out["model.norm.weight"] = draw(hidden, std=0.3)
    if kind != "causal":
        out["score.weight"] = draw(config.num_labels, hidden, std=0.3)
    if kind == "token":
        out["score.bias"] = draw(config.num_labels, std=0.3)
    return out


def build(
    config: Gemma2Config,
    kind: str = "causal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """Our model with :func:`state_dict`'s weights, in eval mode."""
    model = getattr(gemma2, HEADS[kind])(config)
    load(model, state_dict(config, kind, seed))
    return model.to(dtype).eval()


def load(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Copies the weights exactly; every key must be there."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    assert "lm_head.weight" not in missing or config_is_tied(model)
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(value.float(), state[name].float()), name


def config_is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


@functools.lru_cache(maxsize=32)
def tiny(
    shape: str = "three",
    kind: str = "causal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """A model in one line. Cached between tests: do not train it or change its weights."""
    return build(config(shape, **overrides), kind, dtype, seed)


@functools.lru_cache(maxsize=8)
def lively(shape: str = "three", **overrides: Any) -> Any:
    """A float32 model whose greedy text depends on all of the text before. Cached like `tiny`.

    The models of `tiny` repeat their last token for ever: the stream is mostly its embedding, which
    the tied head finds again. Here the layers add as much, and the head is another matrix.
    """
    cfg = config(shape, tie_word_embeddings=False, **overrides)
    state = state_dict(cfg)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].roll(31, dims=0)
    state["lm_head.weight"][:3] = 0.0  # special tokens are not what is written here
    for name, weight in state.items():
        if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            weight += 6.0
    model = gemma2.Gemma2ForCausalLM(cfg)
    load(model, state)
    return model.eval()


def twin(
    config: Gemma2Config,
    kind: str = "causal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str = "eager",
    state: dict[str, Tensor] | None = None,
) -> Any:
    """The model of the same weights in transformers, eager attention (which has the cap).

    state: the weights, if they are not those of `state_dict`.
    """
    import transformers

    fields = {
        k: v
        for k, v in config.to_dict().items()
        if k not in ("rope_parameters", "torch_dtype", "dtype")
    }
    theirs = transformers.Gemma2Config(**fields, attn_implementation=attention)
    model = getattr(transformers, HEADS[kind])(theirs)
    load(model, state_dict(config, kind, seed) if state is None else state)
    return model.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 0, vocab_size: int = 97) -> Tensor:
    """Random ids that are no special tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, vocab_size, (batch, length), generator=generator)


def padded(rows: list[Tensor], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different length -> ids, mask [B, longest]."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[b, columns], mask[b, columns] = row, 1
    return ids, mask


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error over the root mean square of the exact values: none hides in a mean."""
    exact = exact.double()
    scale = exact.square().mean().sqrt().clamp(min=1e-300)
    return float((actual.double() - exact).abs().max() / scale)
