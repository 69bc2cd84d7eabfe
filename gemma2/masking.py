"""Who stands where: from masks, position ids and document bounds to what the kernels ask for.

A position counts a row's real tokens. `lay_out` turns what a caller passes for the S columns of one
call into the position of column 0, the row's length, RoPE's position ids and the start of each
token's document, by arithmetic on the tensors' device. On the CPU, where looking is free, it also
checks what can be checked.

Padding at the left or right needs nothing more. Padding between real tokens (a hole) has no
position to stand at: the row is packed, real tokens first, runs like any right-padded row, and
`Layout.unpack` puts the results back into the caller's columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.ring import readable

__all__ = ["Layout", "Masks", "additive", "lay_out", "prepare"]

Masks = dict[str, Tensor | None]  # by kind of layer; None: the ordinary rule

_HIDDEN = -1e9  # additive masks hide at this value and below


@dataclass
class Layout:
    """Where the columns of one call stand; all tensors int64 on the input's device.

    q_start: [B], position of column 0: minus the number of left pads in a row's first call.
    kv_len: [B], the row's real tokens, this call's included.
    position_ids: [B or 1, S], what RoPE rotates by.
    kv_start: [B, S], position where the token's own document starts; None: one document a row.
    past: tokens in the longest row before this call (on devices an upper bound).
    order, columns: [B, S], of packed rows: the caller's column of each packed one, and back.
    keep_history: the cache must remember position_ids and kv_start.
    """

    q_start: Tensor
    kv_len: Tensor
    position_ids: Tensor
    kv_start: Tensor | None = None
    past: int = 0
    order: Tensor | None = None
    columns: Tensor | None = None
    keep_history: bool = False

    def on(self, device: torch.device) -> Layout:
        """Give what attention asks for on `device`."""
        return replace(
            self,
            q_start=self.q_start.to(device),
            kv_len=self.kv_len.to(device),
            kv_start=None if self.kv_start is None else self.kv_start.to(device),
        )

    def pack(self, x: Tensor) -> Tensor:
        """Give x [B, S, ...] with the real tokens of each row first, if rows are packed."""
        return x if self.order is None else _take(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """Give x [B, S, ...] back in the caller's columns."""
        return x if self.columns is None else _take(x, self.columns)

    def unpack_weights(self, weights: Tensor) -> Tensor:
        """Give attention weights [B, H, S, past + S] back in the caller's rows and columns."""
        if self.columns is None:
            return weights
        columns = self.columns.to(weights.device)
        batch, s = columns.shape
        past = weights.shape[-1] - s
        kept = torch.arange(past, device=weights.device).expand(batch, past)
        keys = torch.cat([kept, columns + past], dim=1)
        rows = columns[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[-1])
        return weights.gather(2, rows).gather(3, keys[:, None, None].expand_as(weights))


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index.to(x.device)]


def prepare(
    batch: int,
    columns: int,
    device: torch.device,
    config: Gemma2Config,
    cache: HybridCache | None,
    *,
    attention_mask: Tensor | Mapping[str, Tensor | None] | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_position: Tensor | None = None,
) -> tuple[Layout, Masks]:
    """Give the layout of a forward call and the masks that replace the ordinary rule, if any.

    The arguments are those of `Gemma2Model.forward`.

    Raises:
        TypeError, ValueError: the text names the argument; nothing has been changed.
    """
    mask, width = None, None
    if isinstance(attention_mask, Tensor):
        if attention_mask.dim() not in (2, 4):
            raise ValueError(
                f"attention_mask: has shape {list(attention_mask.shape)}: it must have 2 or 4 "
                "dimensions"
            )
        attention_mask = attention_mask.to(device)
        if attention_mask.dim() == 2:
            width = attention_mask.shape[1]
            mask = _padding_mask(attention_mask, batch, columns, cache)
    elif attention_mask is not None and not isinstance(attention_mask, Mapping):
        raise TypeError(
            f"attention_mask: is a {type(attention_mask).__name__}: it must be a tensor or a dict "
            "of tensors"
        )
    if cache_position is not None:
        _check_cache_position(cache_position, columns, cache, width)
    layout = lay_out(
        batch,
        columns,
        device,
        mask=mask,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        cache=cache,
    )
    if attention_mask is None or mask is not None:
        return layout, {}
    return layout, _masks_by_kind(attention_mask, config, layout, cache)


# ---- what callers pass ---------------------------------------------------------------------------


def _padding_mask(
    attention_mask: Tensor, batch: int, columns: int, cache: HybridCache | None
) -> Tensor:
    """Give the part of a 2-D mask that describes this call's columns, bool [B, S].

    Args:
        attention_mask: [B, S], or [B, earlier + S] as generation loops keep it; 1 = token. The
            earlier columns have been processed: their ones must be the cache's tokens.

    Raises:
        ValueError: wrong shape; where it can be read: other values than 0 and 1, or an earlier
            part that disagrees with the cache.
    """
    width = attention_mask.shape[1]
    if attention_mask.shape[0] != batch or width < columns or (cache is None and width != columns):
        # made here: a number in a text is compiled as a constant
        wanted = f"[{batch}, {columns}]" if cache is None else f"[{batch}, earlier + {columns}]"
        raise ValueError(
            f"attention_mask: has shape {list(attention_mask.shape)}: a 2-D mask must be {wanted}"
        )
    look = readable(attention_mask)
    if look and attention_mask.dtype != torch.bool:
        strange = (attention_mask != 0) & (attention_mask != 1)
        if bool(strange.any()):
            raise ValueError(
                f"attention_mask: holds {attention_mask[strange][0].item()}: a 2-D mask has 1 for "
                "a token and 0 for padding; additive masks are 4-D"
            )
    mask = attention_mask != 0
    if look and cache is not None and width > columns:
        counted, lengths = mask[:, : width - columns].sum(1), cache.lengths[:batch].cpu()
        if bool((counted != lengths).any()):
            row = int((counted != lengths).nonzero()[0])
            raise ValueError(
                f"attention_mask: has shape {list(attention_mask.shape)}, and row {row} has "
                f"{int(counted[row])} tokens before this call's {columns} columns; the cache has "
                f"{int(lengths[row])}: they must be the same tokens"
            )
    return mask[:, width - columns :]


def _check_cache_position(
    cache_position: Tensor, columns: int, cache: HybridCache | None, mask_width: int | None
) -> None:
    """Check cache_position, which says nothing that the cache does not know.

    It is taken as transformers makes it: the column numbers [S] of this call, counted from the
    longest row's length or, with a 2-D mask over all columns so far, from the columns before.

    Raises:
        ValueError: wrong shape or dtype, or (where it can be read) other numbers.
    """
    if cache_position.shape != (columns,) or cache_position.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cache_position: is {cache_position.dtype} {list(cache_position.shape)}: it must be "
            f"int64 [{columns}]"
        )
    if not readable(cache_position) or (cache is not None and not readable(cache.lengths)):
        return
    firsts = {cache.get_seq_length() if cache is not None else 0}
    if cache is not None and mask_width is not None:
        firsts.add(mask_width - columns)
    first = int(cache_position[0])
    if first not in firsts or bool((cache_position.diff() != 1).any()):
        known = " or ".join(str(n) for n in sorted(firsts))
        raise ValueError(
            f"cache_position: is {cache_position.tolist()[:8]}{'...' if columns > 8 else ''}: "
            f"{columns} columns after {known} must be numbered from there; leave it out, the cache "
            "knows its lengths"
        )


def _check_position_ids(position_ids: Tensor, batch: int, columns: int) -> Tensor:
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"position_ids: is {position_ids.dtype}: it must be int64")
    if position_ids.shape not in ((batch, columns), (1, columns)):
        raise ValueError(
            f"position_ids: has shape {list(position_ids.shape)}: it must be [{batch}, {columns}] "
            f"or [1, {columns}]"
        )
    return position_ids.to(torch.int64).expand(batch, columns)


def _document_numbers(cu_seqlens: Tensor, batch: int, columns: int) -> Tensor:
    """Give the number of each column's document, int64 [B, S], from bounds over B * S columns."""
    if cu_seqlens.dtype not in (torch.int64, torch.int32) or cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens: is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: it must be int32 or "
            "int64 [documents + 1]"
        )
    total = batch * columns
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens: is {bounds}: it must rise from 0 to {total}, the number of columns"
            )
        cut = next((b * columns for b in range(1, batch) if b * columns not in bounds), None)
        if cut is not None:
            raise ValueError(
                f"cu_seqlens: is {bounds}: a document may not run from one row into the next, so "
                f"{cut} must be in it"
            )
    column = torch.arange(total, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens.to(torch.int64), column, right=True)
    return number.view(batch, columns)


# ---- the layout ----------------------------------------------------------------------------------


def lay_out(
    batch: int,
    columns: int,
    device: torch.device,
    *,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: HybridCache | None = None,
) -> Layout:
    """Give the layout of a call of S columns in B rows.

    Args:
        mask: bool [B, S], True = token, as `prepare` gives it. None: all are.
        position_ids: int64 [B or 1, S]. Among real tokens, one that is not greater than the one
            before starts a new document. None: positions, going on from the row's last token.
        cu_seqlens: bounds of documents over the columns of all rows, [n + 1]. Without
            position_ids they begin at 0 in every document, and the first column starts a new one;
            with them, the first column goes on with the cached document where they go on.
        cache: its lengths are where the rows go on.

    Raises:
        TypeError, ValueError: wrong dtype or shape; where it can be read: bounds that make no
            sense. The text names the argument.
    """
    numbers = given = None
    if cu_seqlens is not None:
        numbers = _document_numbers(cu_seqlens, batch, columns).to(device)
    if position_ids is not None:
        given = _check_position_ids(position_ids, batch, columns).to(device)
    past = 0 if cache is None else cache.get_seq_length()
    lengths = None if cache is None or past == 0 else cache.lengths[:batch]

    order = back = None
    if mask is not None and _must_pack(mask, lengths):
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        back = torch.argsort(order, dim=1)
        mask = _take(mask, order)
        given = None if given is None else _take(given, order)
        numbers = None if numbers is None else _take(numbers, order)

    base = torch.zeros(batch, dtype=torch.int64, device=device) if lengths is None else lengths
    if mask is None:
        q_start, kv_len = base.clone(), base + columns
    else:
        # argmax gives the first real column, 0 where a row has none: then all are right pads
        q_start, kv_len = base - mask.to(torch.uint8).argmax(1), base + mask.sum(1)
    column = torch.arange(columns, device=device)
    if lengths is None and mask is None:
        position = column[None]
    else:
        position = q_start[:, None] + column

    last = None if cache is None or lengths is None else cache.last_token(batch)
    layout = Layout(q_start, kv_len, position, None, past, order, back)
    special = False  # whether position_ids and documents are other than the plain ones
    if given is None and numbers is None and last is None:
        layout.position_ids = position if mask is None else position.clamp(min=0)
    else:
        position = position.expand(batch, columns)
        _add_documents(layout, position, base, given, numbers, last)
        special = layout.kv_start is not None or _ids_differ(layout, position)
    layout.keep_history = cache is not None and (special or cache.has_history)
    return layout


def _must_pack(mask: Tensor, lengths: Tensor | None) -> bool:
    """Tell whether padding stands between real tokens of a row, cached ones included.

    Looking costs a synchronisation on a device. There, rows with a past are packed in any case
    (it changes nothing for rows that do not need it), and a first call is trusted.
    """
    if mask.shape[1] == 1 or torch.compiler.is_compiling():
        return False
    if not readable(mask):
        return lengths is not None
    rises = (~mask[:, :-1] & mask[:, 1:]).sum(1)
    runs = rises + mask[:, 0]  # of real tokens, the cached ones not counted
    holes = runs > 1
    if lengths is not None:
        holes |= (rises > 0) & (lengths > 0)
    return bool(holes.any())


def _add_documents(
    layout: Layout,
    position: Tensor,
    lengths: Tensor,
    given: Tensor | None,
    numbers: Tensor | None,
    last: tuple[Tensor, Tensor] | None,
) -> None:
    """Set position_ids and kv_start of `layout`, whose columns stand at `position` [B, S].

    lengths [B] and `last` (position_id and document start of the row's last token, [B] each) are
    the state before the call.
    """
    last_id, start = (lengths - 1, torch.zeros_like(lengths)) if last is None else last
    starts_document = torch.zeros_like(position, dtype=torch.bool)
    if numbers is not None:
        starts_document[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        starts_document[:, 0] = given is None
    real = (position >= lengths[:, None]) & (position < layout.kv_len[:, None])
    if given is not None:
        before = torch.cat([last_id[:, None], given[:, :-1]], dim=1)
        # the first real token goes on from the cache, wherever its column is
        before = torch.where(position == lengths[:, None], last_id[:, None], before)
        starts_document |= (given <= before) & (position > 0)
    kv_start = torch.where(starts_document & real, position, start[:, None])
    kv_start = kv_start.cummax(dim=1).values
    if given is not None:
        ids = given
    elif numbers is not None:
        ids = position - kv_start
    else:
        ids = position + (last_id + 1 - lengths)[:, None]
    layout.position_ids = ids.clamp(min=0)
    alone = readable(kv_start) and not bool((kv_start > 0).any())
    layout.kv_start = None if alone else kv_start


def _ids_differ(layout: Layout, position: Tensor) -> bool:
    """Tell whether a real token's position_id is not its position; True where unreadable."""
    if not readable(position):
        return True
    real = (position >= 0) & (position < layout.kv_len[:, None])
    return bool(((layout.position_ids != position) & real).any())


# ---- masks for the reference path ----------------------------------------------------------------


def _masks_by_kind(
    attention_mask: Tensor | Mapping[str, Tensor | None],
    config: Gemma2Config,
    layout: Layout,
    cache: HybridCache | None,
) -> Masks:
    """Give for each kind of layer the mask [B or 1, 1 or H, S, past + S] that replaces the rule.

    Column c is the key at position q_start - past + c: the cached tokens, then this call's columns.
    A single 4-D mask replaces causality and padding, and the window is added on sliding layers. A
    dict is used verbatim; a kind whose entry is None keeps the ordinary rule.

    Raises:
        TypeError, ValueError: wrong keys, rank, shape or dtype; where it can be read: a key made
            visible that a sliding layer no longer has.
    """
    warnings.warn(
        "gemma2: 4-D attention masks and dicts of masks run through the reference attention, which "
        "is slow and needs memory for every pair of tokens; 2-D masks and cu_seqlens do not",
        stacklevel=2,
    )
    kinds = sorted(set(config.layer_types))
    batch, s = layout.q_start.shape[0], layout.position_ids.shape[1]
    masks: Masks = {}
    if isinstance(attention_mask, Mapping):
        missing = [kind for kind in kinds if kind not in attention_mask]
        if missing:
            raise ValueError(
                f"attention_mask: a dict with {sorted(map(str, attention_mask))}: it must have "
                f"{kinds}"
            )
        for kind in kinds:
            entry = attention_mask[kind]
            name = f'attention_mask["{kind}"]'
            masks[kind] = (
                None if entry is None else _checked_mask(entry, name, config, batch, s, layout.past)
            )
    else:
        mask = _checked_mask(attention_mask, "attention_mask", config, batch, s, layout.past)
        masks = dict.fromkeys(kinds, mask)
        if "sliding_attention" in masks and config.sliding_window is not None:
            key = torch.arange(layout.past + s, device=mask.device)
            query = torch.arange(layout.past, layout.past + s, device=mask.device)[:, None]
            masks["sliding_attention"] = _hide(mask, key <= query - config.sliding_window)
    if cache is not None and layout.past:
        first = cache.first_held(batch)
        position = layout.q_start[:, None] - layout.past
        position = position + torch.arange(layout.past + s, device=position.device)
        for kind, mask_ in masks.items():
            if mask_ is not None:
                lowest = first if kind == "sliding_attention" else torch.zeros_like(first)
                absent = (position < lowest[:, None])[:, None, None]
                _refuse_lost_keys(mask_, absent, position, kind)
                masks[kind] = _hide(mask_, absent)
    return masks


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))


def _refuse_lost_keys(mask: Tensor, absent: Tensor, position: Tensor, kind: str) -> None:
    if not readable(mask):
        return
    seen = mask if mask.dtype == torch.bool else mask > _HIDDEN
    lost = (seen & absent & (position >= 0)[:, None, None]).any(dim=2).any(dim=1)
    if bool(lost.any()):
        row, column = (int(i) for i in lost.nonzero()[-1])
        raise ValueError(
            f'attention_mask["{kind}"]: makes column {column} of row {row} visible: the cache of a '
            "sliding layer no longer has that key"
        )


def _checked_mask(
    mask: object, name: str, config: Gemma2Config, batch: int, s: int, past: int
) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: is a {type(mask).__name__}: it must be a 4-D tensor")
    heads, columns = config.num_attention_heads, past + s
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2] != s
        or mask.shape[3] < columns
    ):
        raise ValueError(
            f"{name}: has shape {list(mask.shape)}: it must be [{batch} or 1, {heads} or 1, {s}, "
            f"{columns}]: a column for each of {past} cached tokens and of this call's {s}"
        )
    mask = mask[..., :columns]  # static caches come with columns for tokens that are yet to be
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name}: is {mask.dtype}: a 4-D mask is bool (True = visible) or floating (added to "
            "the scores)"
        )
    return additive(mask)


def additive(mask: Tensor) -> Tensor:
    """Give a floating mask in float32 with -inf for what it hides, and a bool one as it is."""
    if mask.dtype == torch.bool:
        return mask
    # float16 cannot say -1e9: its lowest number is what hides there
    lowest = max(_HIDDEN, torch.finfo(mask.dtype).min)
    return mask.float().masked_fill(mask <= lowest, float("-inf"))
