"""Keys and values of one layer: a ring on sliding layers, a plain buffer on full ones.

Position p lives in slot p mod C. See cache.py for what the whole cache promises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2 import ops

__all__ = ["TILE", "LayerCache", "has_values", "keep_address", "readable", "round_up"]

TILE = 128  # ring capacities and the start of linear buffers are multiples of it


def round_up(n: int, multiple: int = TILE) -> int:
    """Give the smallest multiple that is not less than n."""
    return -(-n // multiple) * multiple


def readable(tensor: Tensor) -> bool:
    """Tell whether values of `tensor` can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Tell whether `tensor` has values at all, which it has not on meta and while compiling."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return not isinstance(tensor, torch._subclasses.FakeTensor)


def keep_address(tensor: Tensor) -> Tensor:
    """Tell compiled code that `tensor` is written in place and stays where it is.

    Without it `torch.compile(mode="reduce-overhead")` would not capture what writes to it.
    """
    if not torch.compiler.is_compiling():
        # as torch._dynamo.mark_static_address does, whose import takes a second
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return tensor


def _zeros(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # A tensor made in inference mode could not be written to outside of it. Zeros, because
    # the reference path multiplies hidden slots by 0, and 0 times garbage may be NaN.
    with torch.inference_mode(False):
        k = keep_address(torch.zeros(shape, device=device, dtype=dtype))
        v = keep_address(torch.zeros(shape, device=device, dtype=dtype))
    return k, v


class LayerCache:
    """Keys and values of one layer, `k` and `v` [B, Hkv, C, D]; None until the first write."""

    def __init__(self, window: int, margin: int) -> None:
        self.window = window  # 0: a full layer
        self.capacity = 0  # C
        self.wraps = False  # whether positions beyond C are possible
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self._requested_margin = margin

    @property
    def margin(self) -> int:
        """How many positions can be taken back once the ring has wrapped."""
        return self.capacity - self.window

    def resize(self, max_cache_len: int) -> None:
        """Set the capacity for rows of up to `max_cache_len` tokens, keeping what is stored."""
        capacity = round_up(max_cache_len)
        if self.window:
            capacity = min(capacity, round_up(self.window + self._requested_margin))
        k, v = self.k, self.v
        if k is not None and v is not None and capacity > self.capacity:
            # A ring grows only while it is shorter than its final size, hence has never wrapped.
            b, h, slots, d = k.shape
            old = k, v
            k, v = _zeros((b, h, capacity, d), k.device, k.dtype)
            k[:, :, :slots] = old[0]
            v[:, :, :slots] = old[1]
        # In one statement, once nothing can fail: what memory or an interrupt breaks off is not begun.
        wraps, capacity = capacity < max_cache_len, max(capacity, self.capacity)
        self.k, self.v, self.capacity, self.wraps = k, v, capacity, wraps

    def allocate(
        self, batch: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make `k` and `v` [batch, heads, capacity, head_dim], zero; both or neither."""
        self.k, self.v = _zeros((batch, heads, self.capacity, head_dim), device, dtype)

    def buffers(self, batch: int) -> tuple[Tensor, Tensor]:
        """Give `k` and `v` of the first `batch` rows, [batch, Hkv, C, D]."""
        if self.k is None or self.v is None:
            raise RuntimeError("HybridCache: nothing has been written yet, there are no buffers")
        if self.k.shape[0] == batch:
            return self.k, self.v
        return self.k[:batch], self.v[:batch]

    def holds(self, columns: int) -> bool:
        """Tell whether a call of `columns` tokens overwrites nothing that it can see."""
        return not self.wraps or columns <= self.margin + 1

    def as_stored(self, x: Tensor) -> Tensor:
        """Give x as it would come back from the cache: the chunking must not change results."""
        return x if self.k is None else x.to(self.k.dtype)

    def kept_and_chunk(
        self, k: Tensor, v: Tensor, q_start: Tensor, past: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give a linear buffer of the positions still visible, followed by the chunk.

        Args:
            k, v: the chunk, [B, Hkv, S, D], rotated.
            q_start: position of its first column, int64 [B].
            past: tokens in the longest row, or more.

        Returns:
            keys, values [B, Hkv, kept + S, D] in the cache's dtype, and int64 [B], the position of
            slot 0: max(0, round_down(q_start - window + 1, 128)); 0 on full layers.
        """
        kept = past
        k_base = torch.zeros_like(q_start)
        if self.window:
            first = torch.div(q_start - self.window + 1, TILE, rounding_mode="floor") * TILE
            k_base = first.clamp(min=0)
            kept = min(past, self.window - 1 + TILE - 1)
        return *self.by_position(k, v, q_start, k_base, kept + k.shape[2]), k_base

    def by_position(
        self, k: Tensor, v: Tensor, q_start: Tensor, k_base: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Give keys and values [B, Hkv, width, D] of the positions k_base, k_base + 1, ...

        Positions before q_start come from the cache, the others from the chunk. What neither has
        (negative positions, those that a ring has lost, those after the chunk) is some other
        position's entry, which the caller must hide.
        """
        batch, _, columns, _ = k.shape
        k_cache, v_cache = self.buffers(batch)
        position = k_base[:, None] + torch.arange(width, device=k.device)  # [B, width]
        chunk = (position - q_start[:, None]).clamp(0, columns - 1) + self.capacity
        slot = torch.where(position < q_start[:, None], position % self.capacity, chunk)
        rows = torch.arange(batch, device=k.device)[:, None]

        def pick(cached: Tensor, new: Tensor) -> Tensor:
            both = torch.cat([cached, new.to(cached.dtype)], dim=2).transpose(1, 2)
            return both[rows, slot].transpose(1, 2)

        return pick(k_cache, k), pick(v_cache, v)

    def write(self, k: Tensor, v: Tensor, q_start: Tensor, kv_len: Tensor) -> None:
        """Store the last C real positions of a chunk k, v [B, Hkv, S, D]."""
        k_cache, v_cache = self.buffers(k.shape[0])
        with torch.no_grad():
            ops.cache_write(k_cache, v_cache, k.detach(), v.detach(), q_start, kv_len)
