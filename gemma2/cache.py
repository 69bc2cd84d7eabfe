"""The key/value cache of Gemma 2: a ring for sliding layers, a plain buffer for full ones.

A position counts a row's real tokens: padding has no position and is never stored, so the rows of
one batch have lengths of their own. Position p of a layer with C slots lives in slot p mod C; on a
full layer C is never less than the longest row, so that slot p holds position p.

A ring has C = round_up(window + margin, 128) slots, never more than a plain buffer would need.
What exceeds the window, C - window, is the real margin: so many positions can be written ahead and
taken back (`crop`) before a key that is still visible has been overwritten. It is counted from the
highest position written since `reset`, because that is what has been overwritten.

During one forward call the model asks `begin` (checks, growth), lets every layer take its memory and
write, and calls `commit` once after the last layer. Whatever fails in between leaves `lengths` as
they were, and the keys and values below them intact.

What `torch.compile(mode="reduce-overhead")` captures writes to memory that stays: give it a cache with
max_cache_len whose memory is there, because of its device and dtype or of a call before that was
not compiled.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.ring import LayerCache, has_values, keep_address, readable, round_up
from gemma2.snapshot import CacheSnapshot, common_prefix, take

__all__ = ["CacheSnapshot", "HybridCache"]


class HybridCache:
    """Keys and values of a Gemma 2 model, made by hand or by the model and passed on.

    Args:
        config: of the model that will use it.
        max_batch_size: rows; a call may use fewer, then the first ones.
        max_cache_len: tokens a row can hold. None: grows by doubling.
        device: None: each layer's keys and values live where the layer does.
        dtype: None: that of the first write. Another one than the model's is kept and widened by
            the kernels.
        margin: at least so many tokens can be taken back after a ring has wrapped.
        keep_snapshots: how many snapshots `generate` keeps for going back further than the margin:
            of the end of the text as it finds it, and of the prompt's end, where the rings are about
            to forget them; the oldest go first. With two, the last answer can be written again and
            the last message be changed while nothing before them is read again. Each takes up to
            what the rings take: 225 MB a row for the 2B model in bfloat16.

    Attributes:
        lengths: int64 [max_batch_size] on the device, real tokens of each row.
        max_cache_len: tokens a row can hold now.
        reprocessed: tokens processed again by generation because neither the rings nor a snapshot
            reach back so far.
        text: the tokens of each row, a list each, known after `generate` until the model is called
            by hand; rows without a list, and all if it is None, are not known.

    Raises:
        TypeError, ValueError: an argument makes no sense; the text names it.
    """

    def __init__(
        self,
        config: Gemma2Config,
        max_batch_size: int,
        max_cache_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        margin: int = 64,
        keep_snapshots: int = 0,
    ) -> None:
        if not isinstance(config, Gemma2Config):
            raise TypeError(
                f"HybridCache: config is a {type(config).__name__}: it must be a Gemma2Config"
            )
        _check_count("max_batch_size", max_batch_size, 1)
        if max_cache_len is not None:
            _check_count("max_cache_len", max_cache_len, 1)
        _check_count("margin", margin, 0)
        _check_count("keep_snapshots", keep_snapshots, 0)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"HybridCache: dtype is {dtype}: it must be a floating torch.dtype")
        self.max_batch_size = max_batch_size
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.device = None if device is None else torch.empty(0, device=device).device
        self.dtype = dtype
        self.growable = max_cache_len is None
        self.max_cache_len = 0
        self.reprocessed = 0
        self.keep_snapshots = keep_snapshots
        self.layers = [
            LayerCache(config.layer_window(i), margin) for i in range(config.num_hidden_layers)
        ]
        self._longest = 0  # upper bound of lengths; exact where lengths are readable
        self._uncounted = False  # whether it is only max_cache_len, after a compiled call
        # always what the rows begin with: shortened before they are, and lengthened after
        self.text: list[list[int]] | None = None
        self._make_counters(self.device or torch.device("cpu"))
        # position_ids and start of the document of every position, int64 [B, max_cache_len + 1],
        # made once they say more than "position p, one document"; the last column takes padding
        self._history: tuple[Tensor, Tensor] | None = None
        self._snapshots: weakref.WeakSet[CacheSnapshot] = weakref.WeakSet()  # the user's
        self._kept: list[CacheSnapshot] = []  # by keep_snapshot(), oldest first
        self._stream: weakref.ref[Generator[Tensor, None, None]] | None = None
        if max_cache_len is not None:
            self._resize(max_cache_len)
            if self.device is not None and dtype is not None:
                for layer in self.layers:
                    self._allocate(layer, self.device)

    def _make_counters(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            lengths = torch.zeros(self.max_batch_size, dtype=torch.int64, device=device)
            # one more than the highest position written since reset, [B]
            written = torch.zeros_like(lengths)
            self.lengths, self._written = keep_address(lengths), keep_address(written)

    # ---- one forward call -----------------------------------------------------------------------

    def check_model(self, config: Gemma2Config, batch: int, device: torch.device) -> None:
        """Check that this cache fits a model and a batch on `device`; changes nothing.

        Raises:
            ValueError: another number of layers, key/value heads, head_dim or windows, too many
                rows, or another device.
        """
        windows = [config.layer_window(i) for i in range(config.num_hidden_layers)]
        for name, ours, theirs in (
            ("layers", len(self.layers), config.num_hidden_layers),
            ("key/value heads", self.num_key_value_heads, config.num_key_value_heads),
            ("as head_dim", self.head_dim, config.head_dim),
            ("as sliding windows by layer", [layer.window for layer in self.layers], windows),
        ):
            if ours != theirs:
                raise ValueError(
                    f"past_key_values: the cache has {ours} {name}, the model {theirs}: make the "
                    "cache with the model's own config"
                )
        if batch > self.max_batch_size:
            raise ValueError(
                f"past_key_values: the batch has {batch} rows, the cache max_batch_size "
                f"{self.max_batch_size}: make a cache with more rows"
            )
        home = self.device if self._is_empty() else self.lengths.device
        if home is not None and home != device:
            raise ValueError(
                f"past_key_values: the cache is on {home}, the model's input on {device}: make the "
                "cache with device=None, so that it lives where its layers live"
            )

    def _is_empty(self) -> bool:
        return self._longest == 0 and all(layer.k is None for layer in self.layers)

    def place(self, device: torch.device) -> None:
        """Move the counters of a cache that has stored nothing yet to `device`."""
        if self.lengths.device != device:
            self._make_counters(device)

    def begin(self, q_start: Tensor, kv_len: Tensor, columns: int, dtype: torch.dtype) -> None:
        """Make room for a call: check for overflow, grow if allowed.

        Args:
            q_start, kv_len: int64 [B], position of column 0 and real tokens after the call.
            columns: tokens of the call, padding included.
            dtype: of the keys and values, if the cache has none of its own.

        Raises:
            ValueError: more tokens than max_cache_len; nothing has been changed. (RuntimeError in
                compiled code; compiled for a GPU, the error stops the kernel.)
        """
        if self._is_counted_on_device():
            torch._assert_async(
                (kv_len <= self.max_cache_len).all(),
                "past_key_values: a row of the call needs room for more tokens than max_cache_len, "
                f"{self.max_cache_len}: make a larger cache, or call grow()",
            )
        else:
            self._make_room(kv_len, columns)
        self.dtype = self.dtype or dtype
        batch = q_start.shape[0]
        for snapshot in self._snapshots:
            # an empty chunk writes nothing, and q_start is below zero only where nothing is kept
            first = torch.where(kv_len > self.lengths[:batch], q_start.clamp(min=0), kv_len)
            snapshot.note_write(first)
        if all(layer.holds(columns) for layer in self.layers):
            # Written as the layers go, so counted even if a later layer fails. Longer calls write
            # after the last layer, or have nothing to lose.
            self._count_written(kv_len)

    def _make_room(self, kv_len: Tensor, columns: int) -> None:
        need = self._longest_row() + columns
        tight = need > self.max_cache_len and not self.growable and has_values(kv_len)
        if readable(kv_len) or tight:
            # Exact. On another device this waits, but only where padding may save the call.
            need = int(kv_len.max()) if kv_len.numel() else 0
        if need <= self.max_cache_len:
            return
        if not self.growable:
            raise ValueError(
                f"past_key_values: the call needs room for {need} tokens in a row, "
                f"max_cache_len is {self.max_cache_len}: make a larger cache, call "
                f"grow({need}), or pass max_cache_len=None to grow on demand"
            )
        self._resize(round_up(max(need, 2 * self.max_cache_len)))

    def layer(self, index: int, k: Tensor) -> LayerCache:
        """Give the cache of the layer whose new keys are k, with memory on their device.

        Raises:
            ValueError: its memory is on another device.
        """
        layer = self.layers[index]
        if layer.k is None:
            self._allocate(layer, self.device or k.device)
        assert layer.k is not None
        if layer.k.device != k.device:
            raise ValueError(
                f"past_key_values: the cache has layer {index} on {layer.k.device}, the model on "
                f"{k.device}: make a new cache, with device=None, so that each layer's keys and "
                "values live where the layer does"
            )
        return layer

    def _count_written(self, kv_len: Tensor) -> None:
        written = self._written[: kv_len.shape[0]]
        written.copy_(torch.maximum(written, kv_len))

    def commit(self, q_start: Tensor, kv_len: Tensor, columns: int) -> None:
        """Count the call's tokens: the last step of a forward call."""
        batch = kv_len.shape[0]
        self.text = None
        self._count_written(kv_len)
        self.lengths[:batch].copy_(kv_len)
        if readable(self.lengths):
            self.settle(int(self.lengths.max()))
        elif self._is_counted_on_device():
            self._longest, self._uncounted = self.max_cache_len, True
        else:
            self._longest += columns

    def _is_counted_on_device(self) -> bool:
        """Tell whether this is a compiled call that leaves the counting to the device.

        A number of the host that changes with every step would be an input of the compiled code,
        which would then be captured anew for each. Growth needs it all the same.
        """
        return torch.compiler.is_compiling() and not self.growable

    def _longest_row(self) -> int:
        """Give the upper bound of the lengths; after compiled calls this waits for the device."""
        if has_values(self.lengths) and self._uncounted:
            self.settle(int(self.lengths.max()))
        return self._longest

    # ---- documents and position ids -------------------------------------------------------------

    def last_token(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Give position_id and document start of each row's last token, int64 [batch].

        None if every token's position_id is its position and every row is one document. An empty
        row has position_id -1 and document start 0.
        """
        if self._history is None:
            return None
        lengths = self.lengths[:batch]
        last = (lengths - 1).clamp(min=0)[:, None]
        position_id, start = (t[:batch].gather(1, last)[:, 0] for t in self._history)
        empty = lengths == 0
        return position_id.masked_fill(empty, -1), start.masked_fill(empty, 0)

    def record(
        self, q_start: Tensor, kv_len: Tensor, position_ids: Tensor, kv_start: Tensor | None
    ) -> None:
        """Keep position_ids [B or 1, S] and document starts [B, S] of a call's real tokens."""
        slots = self.max_cache_len
        if self._history is None:
            with torch.inference_mode(False):
                plain = torch.arange(slots + 1, device=q_start.device)
                ids = plain.repeat(self.max_batch_size, 1)
                self._history = ids, torch.zeros_like(ids)
        batch, columns = q_start.shape[0], position_ids.shape[1]
        position = q_start[:, None] + torch.arange(columns, device=q_start.device)
        real = (position >= 0) & (position < kv_len[:, None])
        slot = position.masked_fill(~real, slots)
        ids, starts = self._history
        ids[:batch].scatter_(1, slot, position_ids.expand(batch, columns))
        starts[:batch].scatter_(1, slot, torch.zeros_like(slot) if kv_start is None else kv_start)

    @property
    def has_history(self) -> bool:
        """Whether position ids or documents other than the plain ones are being kept."""
        return self._history is not None

    def first_held(self, batch: int) -> Tensor:
        """Give the lowest position that the sliding layers still hold, int64 [batch]."""
        held = [layer.capacity for layer in self.layers if layer.wraps]
        written = self._written[:batch]
        return (written - min(held)).clamp(min=0) if held else torch.zeros_like(written)

    # ---- what callers do with it ----------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Give the tokens in the longest row; exact, past the window too.

        On a device that would have to be waited for: an upper bound, equal to it unless a call
        had padding in every row. It is waited for after compiled calls.
        """
        return int(self.lengths.max()) if readable(self.lengths) else self._longest_row()

    def get_max_cache_shape(self) -> int:
        """Give max_cache_len, under the name that transformers uses."""
        return self.max_cache_len

    @property
    def margin(self) -> int:
        """How many tokens can be taken back after the window has been passed."""
        return min((layer.margin for layer in self.layers if layer.wraps), default=self._longest)

    def crop(self, n: int | Tensor) -> None:
        """Keep the first n tokens of every row; a negative n drops the last -n.

        Args:
            n: int, or int64 [rows] with an n for each of the first rows. Rows with fewer tokens
                than a positive n stay as they are.

        Raises:
            ValueError: a row would have fewer than 0 tokens, or a ring has lost keys that the row
                would see; the text names the smallest possible n, and nothing has been changed.
        """
        self.end_stream()
        rows = self.lengths.shape[0]
        if isinstance(n, Tensor):
            if n.dtype != torch.int64 or n.dim() != 1 or n.shape[0] > rows:
                raise ValueError(
                    f"crop: n is {n.dtype} {list(n.shape)}: it must be an int or an int64 tensor "
                    f"of at most {rows} rows"
                )
            rows = n.shape[0]
            wanted = n.to(self.lengths.device)
        elif isinstance(n, int) and not isinstance(n, bool):
            wanted = torch.full_like(self.lengths, n)
        else:
            raise TypeError(f"crop: n is a {type(n).__name__}: it must be an int or a tensor")
        lengths, written = self.lengths[:rows], self._written[:rows]
        target = torch.where(wanted < 0, lengths + wanted, torch.minimum(wanted, lengths))
        # rows that are not in use have nothing to drop
        target = target.masked_fill(lengths == 0, 0)
        floor = self.least_crop(written)
        # with nothing kept there is nothing to miss, so 0 is always possible, as is no change
        bad = (target < 0) | ((target < floor) & (target > 0) & (target < lengths))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            least, length = int(floor[row]), int(lengths[row])
            raise ValueError(
                f"crop: n is {int(wanted[row])} and row {row} has {length} tokens, "
                f"{int(written[row])} at its longest: the smallest possible n is {least} (or "
                f"{least - length}). What came before has been overwritten in the sliding layers; "
                "use snapshot() and restore() to go back further"
            )
        if self.text is not None:
            counts = target.tolist()
            self.text = [row[:n] for row, n in zip(self.text, counts, strict=False)] + self.text[
                rows:
            ]
        self.lengths[:rows].copy_(target)
        self._written[:rows].masked_fill_(target == 0, 0)
        self.settle(int(self.lengths.max()))

    def least_crop(self, written: Tensor) -> Tensor:
        """Give the least n, besides 0, to which rows can be cropped that were `written` so far, int64."""
        least = torch.zeros_like(written)
        for layer in self.layers:
            if layer.wraps:
                lost = torch.where(written > layer.capacity, written - layer.margin, 0)
                least = torch.maximum(least, lost)
        return least

    def reachable(self, n: Tensor) -> Tensor:
        """Give n, int64 [rows], with 0 for the rows that cannot be cropped to their n."""
        rows = n.shape[0]
        lost = (n < self.least_crop(self._written[:rows])) & (n < self.lengths[:rows])
        return n.masked_fill(lost, 0)

    def reorder(self, beam_idx: Tensor) -> None:
        """Put a copy of row beam_idx[i] in row i.

        Args:
            beam_idx: int64 [n], n at most max_batch_size. Repeats and more rows than are in use
                are allowed.

        Raises:
            ValueError: wrong dtype or shape, or (where it can be read) an index out of range.
        """
        self.end_stream()
        rows = self.max_batch_size
        if beam_idx.dtype not in (torch.int64, torch.int32) or beam_idx.dim() != 1:
            raise ValueError(
                f"reorder: beam_idx is {beam_idx.dtype} {list(beam_idx.shape)}: it must be int64 "
                "[n]"
            )
        if beam_idx.shape[0] > rows:
            raise ValueError(
                f"reorder: beam_idx has {beam_idx.shape[0]} rows, the cache has {rows}"
            )
        if readable(beam_idx) and bool(((beam_idx < 0) | (beam_idx >= rows)).any()):
            raise ValueError(
                f"reorder: beam_idx is {beam_idx.tolist()}: rows are numbered 0 to {rows - 1}"
            )

        snapshots = [*self._kept, *self._snapshots]
        # slots beyond hold nothing that any row, now or after restore(), has a token in
        used = max([self._longest_row(), *(taken.longest for taken in snapshots)])
        moved = list(range(beam_idx.shape[0]))
        if readable(beam_idx):
            moved = [row for row, source in enumerate(beam_idx.tolist()) if row != source]

        def permute(tensor: Tensor | None) -> None:
            if tensor is None:
                return
            sources = beam_idx if len(moved) == beam_idx.shape[0] else beam_idx[moved]
            content = tensor.index_select(0, sources.to(tensor.device))
            if len(moved) == beam_idx.shape[0]:
                tensor[: len(moved)] = content
                return
            for row, its in zip(moved, content, strict=True):
                tensor[row] = its

        text, self.text = self.text, None
        try:
            for layer in self.layers:
                permute(None if layer.k is None else layer.k[:, :, :used])
                permute(None if layer.v is None else layer.v[:, :, :used])
            for tensor in (self._written, *(self._history or ())):
                permute(tensor)
            for snapshot in snapshots:
                permute(snapshot.source)
                permute(snapshot._lowest_write)
            permute(self.lengths)
            if readable(beam_idx):
                if text is not None:
                    rows_from = [*beam_idx.tolist(), *range(beam_idx.shape[0], len(text))]
                    self.text = [text[i] if i < len(text) else [] for i in rows_from]
                if readable(self.lengths):
                    self.settle(int(self.lengths.max()))
        except BaseException:
            self.text = text
            self.forget(beam_idx.shape[0])  # some layers hold other rows than others
            raise

    reorder_cache = reorder

    def forget(self, rows: int) -> None:
        """Empty the first rows, of which it is not known what they hold."""
        if self.text is not None:
            self.text = [[] for _ in self.text[:rows]] + self.text[rows:]
        self.lengths[:rows].zero_()
        self._written[:rows].zero_()

    def reset(self) -> None:
        """Forget every token, and the snapshots that are kept; the memory stays."""
        self.end_stream()
        self.text = None
        self._kept.clear()
        self.lengths.zero_()
        self._written.zero_()
        self.settle(0)
        self._history = None

    def lend(self, stream: Generator[Tensor, None, None]) -> None:
        """Note that a stream writes to the cache."""
        self._stream = weakref.ref(stream)

    def end_stream(self) -> None:
        """End a stream that somebody has not read to its end, for who uses the cache for something else.

        It then leaves the cache with its text, as when it is dropped. Called by the stream itself,
        this does nothing.
        """
        stream = None if self._stream is None else self._stream()
        if stream is not None and inspect.getgeneratorstate(stream) != inspect.GEN_RUNNING:
            self._stream = None
            stream.close()

    def snapshot(self) -> CacheSnapshot:
        """Give a copy of the rings and lengths, to come back to this point by `restore`.

        While it lives, `generate` goes back to it by itself, too, where the cache knows its text.
        """
        taken = take(self)
        self._snapshots.add(taken)
        return taken

    def keep_snapshot(self) -> None:
        """Take a snapshot for `generate` to go back to, in the place of another if need be.

        The first to go is one that is not of the beginning of this text, otherwise the oldest. Nothing is
        done if keep_snapshots is 0, the text is not known, or there is one of it already.
        """
        if not self.keep_snapshots or self.text is None or self.has_history:
            return
        now = self._texts()
        for old in self._kept:
            if old.texts() == now and bool((old.written[old.source] <= self._written).all()):
                return
        while len(self._kept) >= self.keep_snapshots:  # before more memory is taken
            others = [old for old in self._kept if not old.is_of_beginning(now)]
            dropped = (others or self._kept)[0]
            self._kept.remove(dropped)
            self._snapshots.add(dropped)  # follows its rows for who is about to go back to it
        taken = take(self)
        taken._lowest_write.zero_()  # not followed: the texts alone tell whether it holds
        self._kept.append(taken)

    def snapshots(self) -> list[CacheSnapshot]:
        """Give those that `generate` may go back to, the kept ones first, the newest of them first."""
        asked = sorted(self._snapshots, key=lambda taken: taken.longest, reverse=True)
        return [taken for taken in (*self._kept[::-1], *asked) if taken.text is not None]

    def _texts(self) -> list[list[int]]:
        known = self.text or []
        return known + [[] for _ in range(self.max_batch_size - len(known))]

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Go back to where `snapshot` was taken; it can be restored again later.

        Raises:
            ValueError: it is of another cache, rows have been reordered, or positions that it
                covers have been written again in the full layers, which it does not copy, and not
                by the same text.
        """
        if not isinstance(snapshot, CacheSnapshot):
            raise TypeError(
                f"restore: got a {type(snapshot).__name__}: it must be what snapshot() gave"
            )
        self.end_stream()
        if snapshot._owner() is not self:
            raise ValueError("restore: the snapshot is of another cache")
        if snapshot.source.tolist() != list(range(self.max_batch_size)):
            raise ValueError("restore: the snapshot is of no use: rows have been reordered since")
        again = snapshot._lowest_write < snapshot.lengths
        for row in again.nonzero()[:, 0].tolist():
            length = int(snapshot.lengths[row])
            if common_prefix(self._texts()[row], snapshot.texts()[row]) < length:
                raise ValueError(
                    f"restore: row {row} had {length} tokens, and position "
                    f"{int(snapshot._lowest_write[row])} has been written again since: a snapshot "
                    "keeps the sliding layers only"
                )
        self._go_back(snapshot, list(range(self.max_batch_size)), snapshot.lengths)
        self.text = None if snapshot.text is None else list(snapshot.text)
        self._history = None
        if snapshot.history is not None:
            with torch.inference_mode(False):
                ids, starts = (t.clone() for t in snapshot.history)
            length = self.max_cache_len
            self._history = self._padded(ids, length), self._padded(starts, length)

    def restore_rows(self, snapshot: CacheSnapshot, rows: list[int], lengths: list[int]) -> None:
        """Bring rows back to the first so many tokens of the snapshot's text, for whoever has checked.

        The text of these rows begins with these tokens, and the rings of the snapshot reach so far.
        """
        texts = snapshot.texts()
        counts = torch.tensor(lengths, device=self.lengths.device)
        self._go_back(snapshot, rows, counts)
        known = self._texts()
        for row, n in zip(rows, lengths, strict=True):
            known[row] = texts[row][:n]
        self.text = known

    def _go_back(self, snapshot: CacheSnapshot, rows: list[int], lengths: Tensor) -> None:
        """Give rows the rings of a snapshot and these lengths; until it is done, they are empty."""
        index = torch.tensor(rows, device=self.lengths.device)
        source = snapshot.source[index]
        known = self.text or []
        self.text = [[] if row in rows else tokens for row, tokens in enumerate(known)]
        self.lengths.index_fill_(0, index, 0)
        with torch.no_grad():
            for layer, ring in zip(self.layers, snapshot.rings, strict=True):
                for now, then in zip((layer.k, layer.v), ring or (), strict=False):
                    if now is not None:
                        slots = then.shape[2]  # fewer than now if they were not all reached yet
                        here, there = index.to(now.device), source.to(now.device)
                        now[:, :, :slots].index_copy_(0, here, then.index_select(0, there))
            self._written.index_copy_(0, index, snapshot.written[source])
            self.lengths.index_copy_(0, index, lengths)
        self.settle(int(self.lengths.max()))

    def grow(self, new_max_len: int) -> None:
        """Make room for `new_max_len` tokens in a row, keeping what is stored.

        Raises:
            ValueError: new_max_len is less than max_cache_len.
        """
        _check_count("new_max_len", new_max_len, 1)
        if new_max_len < self.max_cache_len:
            raise ValueError(
                f"grow: new_max_len is {new_max_len}, max_cache_len is {self.max_cache_len}: a "
                "cache does not shrink"
            )
        self._resize(new_max_len)

    def advance(self, n: int) -> None:
        """Count n tokens on the host, for whoever replays a graph that advanced `lengths`.

        Raises:
            ValueError: n is negative, or the sum exceeds max_cache_len; nothing has been changed.
        """
        _check_count("n", n, 0)
        if self._longest_row() + n > self.max_cache_len:
            raise ValueError(
                f"advance: {n} tokens after {self._longest} exceed max_cache_len, "
                f"{self.max_cache_len}"
            )
        self.text = None
        self._longest += n

    def settle(self, longest: int) -> None:
        """Take `longest` for the tokens in the longest row, from who knows it without waiting."""
        self._longest, self._uncounted = longest, False

    def rewind(self, lengths: Tensor, longest: int) -> None:
        """Take back tokens without looking: `crop` for whoever is sure that the margin allows it.

        Args:
            lengths: int64 [n], what the first n rows are to have.
            longest: an upper bound of all rows' lengths.
        """
        self.text = None
        self.lengths[: lengths.shape[0]].copy_(lengths)
        self.settle(longest)

    def tensors(self) -> list[Tensor]:
        """Give the tensors that a forward call works on in place, which a captured graph is bound to.

        Growth, reset(), restore() and snapshot() change some of them.
        """
        kept = [t for layer in self.layers for t in (layer.k, layer.v) if t is not None]
        watched = sorted(self._snapshots, key=id)
        kept += [self.lengths, self._written, *(self._history or ())]
        return kept + [snapshot._lowest_write for snapshot in watched]

    # ---- memory ---------------------------------------------------------------------------------

    def _resize(self, max_cache_len: int) -> None:
        for layer in self.layers:  # one that has grown alone serves as before
            layer.resize(max_cache_len)
        history = self._history
        if history is not None:
            ids, starts = history
            history = self._padded(ids, max_cache_len), self._padded(starts, max_cache_len)
        self.max_cache_len, self._history = max_cache_len, history

    def _padded(self, history: Tensor, max_cache_len: int) -> Tensor:
        """Give `history` with a column for each of max_cache_len positions and one for padding."""
        missing = max_cache_len + 1 - history.shape[1]
        with torch.inference_mode(False):
            return torch.nn.functional.pad(history, (0, missing)) if missing else history

    def _allocate(self, layer: LayerCache, device: torch.device) -> None:
        assert self.dtype is not None
        layer.allocate(
            self.max_batch_size, self.num_key_value_heads, self.head_dim, device, self.dtype
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated so far, with those of the snapshots it keeps."""
        tensors = (t for layer in self.layers for t in (layer.k, layer.v) if t is not None)
        own = sum(t.numel() * t.element_size() for t in tensors)
        return own + sum(snapshot.nbytes for snapshot in self._kept)

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles start without snapshots and a stream, which belong to the original
        apart = ("_snapshots", "_kept", "_stream")
        return {name: value for name, value in vars(self).items() if name not in apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._snapshots, self._kept, self._stream = weakref.WeakSet(), [], None

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Give (k, v) of a layer, [max_batch_size, Hkv, C, D]: slot p mod C holds position p."""
        return self.layers[layer_idx].buffers(self.max_batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache

    def __repr__(self) -> str:
        rings = [layer for layer in self.layers if layer.window]
        kinds = [f"{len(self.layers) - len(rings)} full layers of {round_up(self.max_cache_len)}"]
        if rings:
            kinds.append(
                f"{len(rings)} sliding layers of {rings[0].capacity} slots (window "
                f"{rings[0].window})"
            )
        where: Sequence[object] = (self.dtype or "dtype of the first write", self.lengths.device)
        return (
            f"HybridCache({', '.join(kinds)}; longest row {self.get_seq_length()} of "
            f"{self.max_cache_len}, {self.max_batch_size} rows, {where[0]} on {where[1]}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"HybridCache: {name} is {value!r}: it must be an integer")
    if value < least:
        raise ValueError(f"HybridCache: {name} is {value}: it must be at least {least}")
