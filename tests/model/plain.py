"""Gemma 2 in float64, a second time and from the formulas alone: the oracle of the whole model.

It shares no code with the package and none with transformers (whose norms and softmax go through
float32 even in a float64 model). No cache, no fused step, masks of S x S; differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PlainOutput:
    logits: Tensor  # [B, S, V] (of a head: [B, S, labels]), float64
    hidden_states: list[Tensor]  # L + 1 of [B, S, hidden]
    attentions: list[Tensor]  # L of [B, Hq, S, S]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + weight)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [B, H, S, D], positions [B, S]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions[:, None, :, None].double() * frequency
    x1, x2 = x[..., :half], x[..., half:]
    c, s = angle.cos(), angle.sin()
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def who_sees_whom(mask: Tensor, window: int, documents: Tensor | None = None) -> Tensor:
    """bool [B, S, S] by query and key: causal, the window counts the query itself, no pads.

    Args:
        mask: [B, S], 1 = token.
        documents: [B, S] number of each column's document; only equal ones see each other.
    """
    length = mask.shape[1]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (j <= i)[None] & mask.bool()[:, None, :] & mask.bool()[:, :, None]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    if window:
        # the window counts tokens; with contiguous tokens that is the distance in columns
        seen = seen & (j > i - window)
    return seen


def forward(
    state: Mapping[str, Tensor],
    config: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    visible: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    head: str = "lm_head",
) -> PlainOutput:
    """One uncached forward in float64.

    Args:
        state: the state dict of a model with a head, keys as on the hub.
        ids: int64 [B, S].
        mask: [B, S], 1 = token.
        positions: [B, S] for RoPE; default: the number of tokens before.
        documents: [B, S], see :func:`who_sees_whom`.
        visible: replaces the rule: bool [B, S, S] for "sliding_attention" and "full_attention".
        dtype: of the model that is imitated; it decides only how sqrt(hidden_size) is rounded.
        head: "lm_head" (tied when absent, capped) or "score".
    """
    w = {k: v if v.dtype == torch.float64 else v.double() for k, v in state.items()}
    if mask is None:
        mask = torch.ones_like(ids)
    if positions is None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    scale = torch.tensor(math.sqrt(config.hidden_size), dtype=dtype).double()
    x = w["model.embed_tokens.weight"][ids] * scale
    batch, length = ids.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden_states, attentions = [x], []
    eps = config.rms_norm_eps
    for n in range(config.num_hidden_layers):

        def p(name: str, n: int = n) -> Tensor:
            return w[f"model.layers.{n}.{name}.weight"]

        def split(y: Tensor, count: int) -> Tensor:
            return y.view(batch, length, count, config.head_dim).transpose(1, 2)

        sliding = n % 2 == 0
        if visible is not None:
            seen = visible["sliding_attention" if sliding else "full_attention"]
        else:
            seen = who_sees_whom(mask, config.sliding_window if sliding else 0, documents)
        h = norm(x, p("input_layernorm"), eps)
        q = rotate(split(h @ p("self_attn.q_proj").T, heads), positions, config.rope_theta)
        k = rotate(split(h @ p("self_attn.k_proj").T, kv_heads), positions, config.rope_theta)
        v = split(h @ p("self_attn.v_proj").T, kv_heads)
        # query head i belongs to key/value head i // group
        k = torch.stack([k[:, i // (heads // kv_heads)] for i in range(heads)], dim=1)
        v = torch.stack([v[:, i // (heads // kv_heads)] for i in range(heads)], dim=1)
        scores = q @ k.transpose(2, 3) / math.sqrt(config.query_pre_attn_scalar)
        if config.attn_logit_softcapping is not None:
            cap = config.attn_logit_softcapping
            scores = cap * torch.tanh(scores / cap)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * seen[:, None]
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        attentions.append(weights)
        merged = (weights @ v).transpose(1, 2).reshape(batch, length, heads * config.head_dim)
        x = x + norm(merged @ p("self_attn.o_proj").T, p("post_attention_layernorm"), eps)
        h = norm(x, p("pre_feedforward_layernorm"), eps)
        h = gelu_tanh(h @ p("mlp.gate_proj").T) * (h @ p("mlp.up_proj").T)
        x = x + norm(h @ p("mlp.down_proj").T, p("post_feedforward_layernorm"), eps)
        hidden_states.append(x)
    hidden_states[-1] = norm(x, w["model.norm.weight"], eps)
    if head == "lm_head":
        logits = hidden_states[-1] @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
        if config.final_logit_softcapping is not None:
            cap = config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
    else:
        logits = hidden_states[-1] @ w["score.weight"].T
        if "score.bias" in w:
            logits = logits + w["score.bias"]
    return PlainOutput(logits, hidden_states, attentions)
