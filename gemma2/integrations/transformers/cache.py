"""Our cache, in the form in which transformers' Gemma 2 takes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gemma2 import cache as ours
from gemma2 import ops
from gemma2.config import Gemma2Config
from gemma2.integrations.transformers.call import Call, Offset, Rows
from gemma2.masking import prepare


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
        self._call: Call | None = None
        kinds = [self.config.layer_window(i) > 0 for i in range(self.config.num_hidden_layers)]
        super().__init__(layers=[_Layer(self, i, sliding) for i, sliding in enumerate(kinds)])

    # ---- a forward call: masks, then each layer ----------------------------------------------

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Give the columns that masks are for, and the number of the first.

        Args:
            query: the call's columns, or (transformers 4) their numbers, int64 [S].
        """
        offset = Offset(0)
        offset.lay_out = self.lay_out
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
        call = self._call = Call(layout, columns, mask)
        return Rows(layout.q_start, layout.kv_len, None, None, width, window, call)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [B, Hkv, S, D] and give what attention reads.

        Raises:
            ValueError: the call has not gone through our masks, or there is no room.
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

    def _finish(self, call: Call, inner: ours.HybridCache) -> None:
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
