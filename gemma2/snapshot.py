"""What brings a cache back to an earlier text: copies of its rings, which forget."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.ring import has_values

if TYPE_CHECKING:
    from gemma2.cache import HybridCache

__all__ = ["CacheSnapshot", "common_prefix"]


@dataclass(eq=False)
class CacheSnapshot:
    """The rings, the lengths and the text of a cache at one moment, and not the full layers.

    A full layer keeps every position below a row's length, so nothing of it is copied. It brings back
    as much of the snapshot's text as it still has, which `_lowest_write` (the first position written
    since) or the texts themselves tell.

    lengths, written: int64 [max_batch_size], as in the cache.
    rings: keys and values [max_batch_size, Hkv, slots, D] of each sliding layer that had any.
    text: the tokens of each row; None: they were not known.
    source: int64 [max_batch_size], which row of the snapshot each row of the cache goes back to:
        reordering changes it.
    """

    lengths: Tensor
    written: Tensor
    longest: int
    rings: list[tuple[Tensor, Tensor] | None]
    history: tuple[Tensor, Tensor] | None
    text: list[list[int]] | None
    source: Tensor
    _lowest_write: Tensor = field(repr=False)
    _owner: weakref.ref[HybridCache] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that have been copied."""
        tensors = (t for ring in self.rings if ring is not None for t in ring)
        return sum(t.numel() * t.element_size() for t in tensors)

    def texts(self) -> list[list[int]]:
        """Give the text that each of the cache's rows goes back to, [] where it is not known."""
        known = self.text or []
        return [known[row] if row < len(known) else [] for row in self.source.tolist()]

    def is_of_beginning(self, texts: list[list[int]]) -> bool:
        """Tell whether each of the cache's rows began with what it goes back to."""
        pairs = zip(self.texts(), texts, strict=True)
        return all(text[: len(own)] == own for own, text in pairs)

    def note_write(self, first: Tensor) -> None:
        """Note that the first rows are written from `first`, int64 [B], on."""
        low = self._lowest_write[: first.shape[0]]
        low.copy_(torch.minimum(low, first))


def take(cache: HybridCache) -> CacheSnapshot:
    """Give a snapshot of a cache as it is."""
    with torch.inference_mode(False), torch.no_grad():
        written, rings = cache._written, []
        # slots that no position has reached yet hold nothing
        reached = int(written.max()) if has_values(written) else cache.max_cache_len
        for layer in cache.layers:
            held = (layer.k, layer.v) if layer.window else (None, None)
            k, v = (None if t is None else t[:, :, :reached].clone() for t in held)
            rings.append(None if k is None or v is None else (k, v))
        history = cache._history
        return CacheSnapshot(
            cache.lengths.clone(),
            written.clone(),
            cache._longest_row(),
            rings,
            None if history is None else (history[0].clone(), history[1].clone()),
            None if cache.text is None else list(cache.text),
            torch.arange(cache.max_batch_size, device=written.device),
            torch.full_like(written, torch.iinfo(torch.int64).max),
            weakref.ref(cache),
        )


def common_prefix(a: list[int], b: list[int]) -> int:
    """Give how many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves, since slices are compared much faster than tokens one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
