"""transformers' mask function of "gemma2": where the columns stand, instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as theirs

from gemma2.integrations.transformers.call import NAME, Offset, Rows, check_model
from gemma2.ring import has_values, readable


def attention_mask(
    batch_size: int,
    cache_position: Tensor | None = None,
    kv_length: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = theirs.causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    local_size: int | None = None,
    device: torch.device | str | None = None,
    config: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Rows | Tensor:
    """Give what `attention` needs to know of a call: transformers' mask function of "gemma2".

    Args:
        cache_position: int64 [S], numbers of the queries' columns; transformers 5 gives q_length,
            q_offset and device instead.
        kv_length, kv_offset: columns of the keys, and the number of the first.
        mask_function: (row, head, query column, key column) -> visible.
        attention_mask: bool [B, columns so far], True = token.
        local_size: the window of these layers.

    Returns:
        Rows, or a mask bool [B, 1, S, kv_length] where Rows cannot say it: which is said once.

    Raises:
        ValueError: the model is no Gemma 2.
    """
    check_model(getattr(config, "model_type", NAME))
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    device = torch.device(device or "cpu")
    window = local_size or 0
    known, packed = _read(mask_function, local_size)
    known = known and not use_vmap  # transformers 5 says so of functions of the caller's
    if known and isinstance(kv_offset, Offset):
        return kv_offset.lay_out(batch_size, q_length, attention_mask, window, device)
    if known and cache_position is not None and readable(cache_position):
        known = bool((cache_position.diff() == 1).all())
    start = torch.zeros(batch_size, dtype=torch.int64, device=device)
    end = start + (q_offset + q_length)
    if attention_mask is not None:
        mask = attention_mask[:, : kv_offset + kv_length]
        start, end, whole = _runs(mask, kv_offset)
        if has_values(whole):
            known = known and bool(whole.all())
        else:
            torch._assert_async(
                whole.all(),
                "attention_mask: has padding between real tokens, which compiled code does not "
                "look for: pad at the left or right",
            )
    if not known:
        return _matrix(
            batch_size,
            cache_position,
            q_length=q_length,
            q_offset=q_offset,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            use_vmap=use_vmap,
            **kwargs,
        )
    kv_start = None
    if packed and attention_mask is None and q_length == kv_length:
        kv_start = _documents(mask_function, batch_size, q_length, device)
    return Rows(q_offset - start, end - start, kv_start, kv_offset - start, kv_length, window)


def _runs(mask: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the first real column of each row and the one after the last, and whether from column
    `offset` on there is no padding between them; int64, int64 and bool [B]."""
    number = mask.to(torch.uint8)
    some = mask.any(1)
    first = number.argmax(1)
    end = torch.where(some, mask.shape[1] - number.flip(1).argmax(1), first)
    inside = mask[:, offset:].sum(1)
    return (
        first,
        end,
        inside == end - torch.maximum(first, torch.full_like(first, offset)).minimum(end),
    )


# What transformers composes its masks of: functions made at one place share their code.
_AND = theirs.and_masks(theirs.causal_mask_function).__code__
_WINDOW = theirs.sliding_window_overlay(1).__code__
_PACKED = theirs.packed_sequence_mask_function(torch.zeros(1)).__code__
_REMAPPED = (  # transformers 5: positions within a document, which differ by as much as columns do
    theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, torch.zeros(1)).__code__
    if hasattr(theirs, "remap_positions_for_packed_sequence")
    else None
)


def _read(mask_function: Callable[..., Any], window: int | None) -> tuple[bool, bool]:
    """Tell whether `mask_function` says causality, `window` and packed documents and no more.

    Returns:
        whether, and whether there are packed documents in it.
    """
    if torch.compiler.is_compiling():  # which does not show what a function closes over
        plain = mask_function is theirs.causal_mask_function
        return plain or mask_function.__code__ is _AND, not plain
    found = {"causal": 0, "window": 0, "packed": 0}
    waiting: list[Any] = [mask_function]
    while waiting:
        part = waiting.pop()
        if part is theirs.causal_mask_function:
            found["causal"] += 1
            continue
        code, closure = getattr(part, "__code__", None), getattr(part, "__closure__", None)
        if code is None or closure is None:
            return False, False
        held = {n: cell.cell_contents for n, cell in zip(code.co_freevars, closure, strict=True)}
        if code is _AND:
            waiting.extend(held["mask_functions"])
        elif code is _WINDOW and held["sliding_window"] == window:
            found["window"] += 1
        elif code is _PACKED:
            found["packed"] += 1
        elif code is _REMAPPED:
            waiting.append(held["mask_function"])
        else:
            return False, False
    packed = found.pop("packed") > 0
    return found == {"causal": 1, "window": int(window is not None)}, packed


def _documents(
    mask_function: Callable[..., Any], batch: int, columns: int, device: torch.device
) -> Tensor | None:
    """Give the first column of each column's document, int64 [B, S]; None: one document a row.

    A column starts one if it does not see the column before it. (With a window of 1 none does, and
    it does not matter.)
    """
    row = torch.arange(batch, device=device)[:, None]
    column = torch.arange(columns, device=device)[None]
    before = (column - 1).clamp(min=0)
    starts = ~mask_function(row, torch.zeros_like(row), column, before) & (column > 0)
    if readable(starts) and not bool(starts.any()):
        return None
    return (column * starts).cummax(1).values


def _matrix(batch_size: int, cache_position: Tensor | None, **kwargs: Any) -> Tensor:
    """Give transformers' own mask, bool [B, 1, S, kv_length]."""
    if isinstance(kwargs["kv_offset"], Offset):
        raise ValueError(
            "past_key_values: gemma2.integrations.transformers.HybridCache knows causal masks with "
            "padding only: use a DynamicCache of transformers with other masks"
        )
    if cache_position is not None:
        for name in ("q_length", "q_offset", "device", "use_vmap"):
            del kwargs[name]
        kwargs["cache_position"] = cache_position
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = theirs.sdpa_mask(batch_size, **{**kwargs, **skips})
    assert mask is not None
    return mask
