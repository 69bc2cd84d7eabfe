"""transformers' attention function of "gemma2"."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gemma2 import ops, reference
from gemma2.integrations.transformers.call import Rows, check_model
from gemma2.masking import additive


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rows | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as Gemma 2 does: transformers' attention function of "gemma2".

    Args:
        module: transformers' Gemma2Attention.
        query: [B, Hq, S, D], rotated; key, value: [B, Hkv, columns, D], what the cache gave.
        attention_mask: what `attention_mask` gave, or a mask [B or 1, 1 or Hq, S, columns] of the
            caller's, bool or additive, which is used verbatim, by the reference.
        output_attentions: also gives the weights [B, Hq, S, columns], by the reference.

    Returns:
        [B, S, Hq, D] in query's dtype, and the weights or None.

    Raises:
        ValueError: another model, dropout, no mask or one for other keys; the text says which.
    """
    config = getattr(module, "config", None)
    check_model(getattr(config, "model_type", None))
    if dropout > 0.0:
        raise ValueError(
            f"attention_dropout: is {dropout}: the kernels have none: set "
            'model.config.attention_dropout to 0, or train with attn_implementation="eager"'
        )
    cap = getattr(config, "attn_logit_softcapping", None) if softcap is None else softcap
    window = sliding_window or 0
    options: dict[str, Any] = {
        "scale": float(module.scaling if scaling is None else scaling),  # type: ignore[arg-type]
        "softcap": float(cap or 0.0),
    }
    if isinstance(attention_mask, Tensor):
        return _attend_by_matrix(query, key, value, attention_mask, options, output_attentions)
    if not isinstance(attention_mask, Rows):
        raise ValueError(
            f"attention_mask: a {type(attention_mask).__name__} has come to the attention of "
            'attn_implementation="gemma2": pass the model a mask [B, S] or [B, 1, S, columns], or '
            "a dict with one for each kind of layer"
        )
    rows = attention_mask.to(query.device)
    if window != rows.window:
        raise ValueError(
            f"attention_mask: is for layers with a window of {rows.window}, this one has {window} "
            "(0 for none)"
        )
    options["window"] = window
    if rows.call is not None:
        if output_attentions:
            raise ValueError(
                "output_attentions: a ring has no columns to give weights for: use a DynamicCache "
                "of transformers"
            )
        return rows.call.attend(query, key, value, options), None
    if key.shape[2] != rows.width:
        raise ValueError(
            f"attention_mask: is for {rows.width} columns, the cache gave {key.shape[2]} keys: one "
            "cache must serve the whole call"
        )
    where = (rows.q_start, rows.kv_len, rows.kv_start, rows.k_base)
    weights = None
    if output_attentions:
        _say_reference("output_attentions")
        weights = reference.attention_weights(query, key, *where, **options).to(query.dtype)
    deterministic = torch.are_deterministic_algorithms_enabled()
    out, _ = ops.attention(query, key, value, *where, **options, deterministic=deterministic)
    return out.transpose(1, 2), weights


def _attend_by_matrix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: dict[str, Any],
    output_attentions: bool | None,
) -> tuple[Tensor, Tensor | None]:
    wanted = (query.shape[2], key.shape[2])
    if mask.dim() != 4 or mask.shape[2:] != wanted:
        raise ValueError(
            f"attention_mask: has shape {list(mask.shape)}: this layer needs [B, 1, {wanted[0]}, "
            f"{wanted[1]}]; where sliding layers keep fewer keys than others, pass a dict with a "
            "mask for each kind of layer"
        )
    _say_reference("masks other than padding at the left or right")
    mask = additive(mask)
    nowhere = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    where = (nowhere, nowhere)  # the mask stands for them
    weights = None
    if output_attentions:
        weights = reference.attention_weights(query, key, *where, **options, mask=mask)
        weights = weights.to(query.dtype)
    out, _ = reference.attention(query, key, value, *where, **options, mask=mask)
    return out.transpose(1, 2), weights


def _say_reference(what: str) -> None:
    warnings.warn(
        f'attn_implementation="gemma2": {what} run through the reference attention, which is slow '
        "and needs memory for every pair of tokens",
        stacklevel=2,
    )
