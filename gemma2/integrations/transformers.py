"""Our attention and our cache inside transformers' own Gemma 2, versions 4.57 and 5.

    import gemma2.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gemma2")

Importing this module registers the name "gemma2" twice: with transformers' AttentionInterface, and
with its AttentionMaskInterface, without which a model would not hear of padding at all.

transformers numbers columns, padding included; our kernels number a row's real tokens. `attention_mask`
turns one into the other once for all layers of a kind and gives `Rows` instead of a matrix
[B, 1, S, S]. Whatever says more than padding, causality, the window and packed documents is made
a matrix after all and goes to `gemma2.reference`.

`HybridCache` is a cache for `model(..)` and `generate(past_key_values=..)`: a ring on sliding layers,
which attention reads where it lies, and which can take tokens back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import masking_utils as theirs
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise ImportError(
        "gemma2.integrations.transformers: needs transformers 4.57 or newer "
        f"(pip install 'gemma2[transformers]'): {error}"
    ) from error

from gemma2 import cache as ours
from gemma2 import ops, reference
from gemma2.config import Gemma2Config
from gemma2.masking import Layout, additive, prepare
from gemma2.ring import LayerCache, has_values, readable

__all__ = ["HybridCache", "attention", "attention_mask"]

NAME = "gemma2"

# ---- masks ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Rows:
    """Where the columns of one call stand, for all layers of one kind; int64 tensors.

    q_start, kv_len, k_base: [B], kv_start: [B, S], as `gemma2.ops.attention` takes them.
    width: columns of the keys that this was made for.
    window: of these layers, 0 for none.
    call: of a `HybridCache`, which says where its keys lie.
    """

    q_start: Tensor
    kv_len: Tensor
    kv_start: Tensor | None
    k_base: Tensor | None
    width: int
    window: int
    call: _Call | None = None

    def to(self, device: Any, *_: Any, **__: Any) -> Rows:
        """Give this on `device`: what accelerate calls where layers live on several."""
        if self.q_start.device == torch.device(device):
            return self
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in vars(self).items()
            if name in ("q_start", "kv_len", "kv_start", "k_base")
        }
        return replace(self, **moved)


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
    kind = getattr(config, "model_type", NAME)
    if kind != NAME:
        raise ValueError(
            f'attn_implementation: "gemma2" serves Gemma 2 models, this is "{kind}": load it with '
            'attn_implementation="sdpa" or "eager"'
        )
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    device = torch.device(device or "cpu")
    window = local_size or 0
    known, packed = _read(mask_function, local_size)
    known = known and not use_vmap  # transformers 5 says so of functions of the caller's
    if known and isinstance(kv_offset, _Offset):
        return kv_offset.cache.lay_out(batch_size, q_length, attention_mask, window, device)
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
    if isinstance(kwargs["kv_offset"], _Offset):
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


# ---- attention -----------------------------------------------------------------------------------


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
    kind = getattr(config, "model_type", None)
    if kind != NAME:
        raise ValueError(
            f'attn_implementation: "gemma2" serves Gemma 2 models, this is "{kind}": load it with '
            'attn_implementation="sdpa" or "eager"'
        )
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


# ---- the cache -----------------------------------------------------------------------------------


class _Offset(int):
    """0, the number of the first column, with the cache that gave it to transformers' masks."""

    cache: HybridCache


@dataclass(eq=False)
class _Call:
    """A forward call that a HybridCache is part of."""

    layout: Layout
    columns: int
    mask: Tensor | None  # bool [B, columns so far]; None: all real
    next_layer: int = 0
    k_base: Tensor | None = None  # of what the last layer was given; None: a ring
    unwritten: list[tuple[LayerCache, Tensor, Tensor]] | None = None

    def pack(self, x: Tensor) -> Tensor:
        """Give x [B, H, S, D] with the real tokens of each row first."""
        return self.layout.pack(x.transpose(1, 2)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Give [B, S, H, D] over what `HybridCache.update` gave for this layer."""
        at = self.layout.on(q.device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        out, _ = ops.attention(
            self.pack(q), k, v, at.q_start, at.kv_len, None, self.k_base, **options,
            deterministic=deterministic,
        )  # fmt: skip
        return at.unpack(out.transpose(1, 2))


class HybridCache(Cache):
    """A `gemma2.HybridCache` for transformers' Gemma 2 with attn_implementation="gemma2".

    Sliding layers keep a ring of window + margin tokens, full layers all; padding is not kept. So
    much as `margin` tokens can be taken back (`crop`) past the window, which assisted decoding and
    prompt lookup need.

    A window counts a row's tokens. transformers' caches count columns, so that padding between the
    tokens of a row (behind a prompt, when it goes on) shortens their window, not this one's.

    Args:
        config: the model's, of transformers or of this package.
        max_batch_size: rows, beams included. None: as many as the first call has.
        max_cache_len: tokens a row can hold. None: grows by doubling.
        device, dtype, margin: as `gemma2.HybridCache` takes them.

    Attributes:
        inner: the `gemma2.HybridCache`, None before the first call.

    Raises:
        TypeError, ValueError: an argument makes no sense; the text names it.
    """

    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(
        self,
        config: Any,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        margin: int = 64,
    ) -> None:
        self.config = _our_config(config)
        self._options: dict[str, Any] = {
            "max_cache_len": max_cache_len, "device": device, "dtype": dtype, "margin": margin
        }  # fmt: skip
        self.inner: ours.HybridCache | None = None
        if max_batch_size is not None:
            self.inner = ours.HybridCache(self.config, max_batch_size, **self._options)
        else:
            ours.HybridCache(self.config, 1, margin=margin)  # complains of what makes no sense
        self._columns = 0  # that have been processed, padding included
        self._mask: Tensor | None = None  # bool [B, columns]; None: all of them are real
        self._rows = 0
        self._call: _Call | None = None
        kinds = [self.config.layer_window(i) > 0 for i in range(self.config.num_hidden_layers)]
        super().__init__(layers=[_Layer(self, i, sliding) for i, sliding in enumerate(kinds)])

    # ---- a forward call: masks, then each layer ----------------------------------------------

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Give the columns that masks are for, and the number of the first.

        Args:
            query: the call's columns, or (transformers 4) their numbers, int64 [S].
        """
        offset = _Offset(0)
        offset.cache = self
        columns = query.shape[0] if isinstance(query, Tensor) else query
        return self._columns + columns, offset

    def lay_out(
        self,
        batch: int,
        columns: int,
        attention_mask: Tensor | None,
        window: int,
        device: torch.device,
    ) -> Rows:
        """Give where the columns of a call stand, and expect the call's keys.

        Args:
            attention_mask: bool [B, columns so far, this call's included].

        Raises:
            ValueError: the mask has another shape, or does not fit what the cache holds; or the
                batch has more rows than the cache. Nothing has been changed.
        """
        mask = attention_mask
        width = self._columns + columns
        if mask is not None and mask.shape != (batch, width):
            raise ValueError(
                f"attention_mask: has shape {list(mask.shape)}: it must be [{batch}, {width}], a "
                f"column for each of {self._columns} that the cache has seen and of this call's "
                f"{columns}"
            )
        if self.inner is None:
            self.inner = ours.HybridCache(self.config, batch, **self._options)
        self.inner.check_model(self.config, batch, device)
        self.inner.place(device)
        layout, _ = prepare(batch, columns, device, self.config, self.inner, attention_mask=mask)
        if mask is None and self._mask is not None:
            new = torch.ones(batch, columns, dtype=torch.bool, device=device)
            mask = torch.cat([self._mask[:batch], new], dim=1)
        call = self._call = _Call(layout, columns, mask)
        return Rows(layout.q_start, layout.kv_len, None, None, width, window, call)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [B, Hkv, S, D] and give what attention reads.

        Raises:
            ValueError: the call has not gone through this module's masks, or there is no room.
        """
        call, inner = self._call, self.inner
        k, v = key_states, value_states
        if call is None or inner is None or call.next_layer != layer_idx:
            raise ValueError(
                "past_key_values: gemma2.integrations.transformers.HybridCache serves models with "
                'attn_implementation="gemma2" and masks [B, S]: load the model so, or use a '
                "DynamicCache of transformers"
            )
        at = call.layout
        if layer_idx == 0:
            inner.begin(at.q_start, at.kv_len, call.columns, k.dtype)
            call.unwritten = []
        call.next_layer += 1
        layer = inner.layer(layer_idx, k)
        there = at.on(k.device)
        k, v = call.pack(k), call.pack(v)
        wants_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        call.k_base = None
        if layer.holds(call.columns) and not wants_grad:
            keys, values = layer.buffers(k.shape[0])
            ops.cache_write(keys, values, k, v, there.q_start, there.kv_len)
        elif at.past:
            keys, values, call.k_base = layer.kept_and_chunk(k, v, there.q_start, at.past)
            call.unwritten.append((layer, k, v))  # type: ignore[union-attr]
        else:
            keys, values, call.k_base = layer.as_stored(k), layer.as_stored(v), there.q_start
            layer.write(k, v, there.q_start, there.kv_len)  # there is nothing to lose
        if call.next_layer == len(self.layers):
            self._finish(call, inner)
        return keys, values

    def _finish(self, call: _Call, inner: ours.HybridCache) -> None:
        for layer, k, v in call.unwritten or ():
            there = call.layout.on(k.device)
            layer.write(k, v, there.q_start, there.kv_len)
        inner.commit(call.layout.q_start, call.layout.kv_len, call.columns)
        self._columns += call.columns
        self._rows = call.layout.q_start.shape[0]
        self._mask, self._call = call.mask, None

    # ---- what generation asks for and does ---------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Give the columns processed so far, padding included."""
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Give the number of the next column."""
        return self._columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Give the tokens a row can hold, -1 if that grows."""
        return -1 if self._options["max_cache_len"] is None else self.max_cache_len

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Give the tokens a row can hold, -1 if that grows."""
        return self.get_max_cache_shape()

    @property
    def max_cache_len(self) -> int:
        """The tokens a row can hold now."""
        given: int | None = self._options["max_cache_len"]
        return self.inner.max_cache_len if self.inner is not None else given or 0

    @property
    def max_batch_size(self) -> int:
        """The rows there is room for; 0 before the first call decides."""
        return 0 if self.inner is None else self.inner.max_batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated so far."""
        return 0 if self.inner is None else self.inner.nbytes

    def activate_past_recording(self) -> None:
        """Do nothing: the margin of the rings is always there to go back."""

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; a negative number drops so many.

        0 keeps none in transformers 4 and drops none in transformers 5, as their own caches do.

        Raises:
            ValueError: a ring has lost keys that would be seen; the text names what is possible.
        """
        keep = max_length if max_length > 0 else self._columns + max_length
        if max_length == 0:
            keep = self._columns if transformers.__version__ >= "5" else 0
        if self.inner is None or keep >= self._columns:
            return
        if keep < 0:
            raise ValueError(
                f"crop: {max_length} of {self._columns} columns: there are not so many"
            )
        if self._mask is None:
            lengths = torch.full_like(self.inner.lengths[: self._rows], keep)
        else:
            lengths = self._mask[: self._rows, :keep].sum(1)
        self.inner.crop(lengths)
        self._columns = keep
        self._mask = None if self._mask is None else self._mask[:, :keep]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put a copy of row beam_idx[i] in row i."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row after one another."""
        self._select(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._select(indices)

    def _select(self, index: Tensor) -> None:
        if self.inner is None:
            return
        if len(index) > self.inner.max_batch_size:
            raise ValueError(
                f"past_key_values: {len(index)} rows are wanted, the HybridCache has "
                f"{self.inner.max_batch_size}: make it with max_batch_size={len(index)}"
            )
        self.inner.reorder(index.to(self.inner.lengths.device))
        self._rows = len(index)
        if self._mask is not None:
            self._mask = self._mask[index.to(self._mask.device)]

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        if self.inner is not None:
            self.inner.reset()
        self._columns, self._mask, self._call = 0, None, None

    def __repr__(self) -> str:
        return f"HybridCache(columns={self._columns}, inner={self.inner!r})"


class _Layer(CacheLayerMixin):
    """One layer of a HybridCache, for what looks at `cache.layers`."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: HybridCache, index: int, is_sliding: bool) -> None:
        self._cache, self._index, self.is_sliding = cache, index, is_sliding
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """[B, Hkv, C, D]: slot p mod C holds position p."""
        return None if self._cache.inner is None else self._cache.inner.layers[self._index].k

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """As `keys`."""
        return None if self._cache.inner is None else self._cache.inner.layers[self._index].v

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the cache does it as a whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query, self._index)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_cache_shape(self) -> int:
        return self._cache.get_max_cache_shape()

    get_max_length = get_max_cache_shape


def _our_config(config: Any) -> Gemma2Config:
    """Give the configuration of a Gemma 2 of transformers, or of this package, as ours."""
    if isinstance(config, Gemma2Config):
        return config
    values = getattr(config, "get_text_config", lambda: config)()
    values = values.to_dict() if hasattr(values, "to_dict") else values
    if not isinstance(values, Mapping):
        raise TypeError(
            f"HybridCache: config is a {type(config).__name__}: it must be model.config"
        )
    return Gemma2Config.from_dict(values)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
