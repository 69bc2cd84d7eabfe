"""Lengths around the window x chunk sizes x padding x cache, continued, cropped twice.

Every cell compares the logits of every real token with one uncached forward in float64 of its row
alone. The rows of a batch have different lengths. The rings: one far larger than its window, two
whose margin is small, one with no margin at all (where every chunk of two tokens takes the path of
long chunks).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import ops
from tests.model import factories as F
from tests.model import plain

WINDOWS = {  # window -> requested margin; the ring has round_up(window + margin, 128) slots
    8: 64,  # 128: a real margin of 120
    100: 28,  # 128: a real margin of 28
    120: 8,  # 128: a real margin of 8
    128: 0,  # 128: no margin
}
MARGIN = {8: 120, 100: 28, 120: 8, 128: 0}
SIDES = ["none", "left", "right"]
EXTRA = 40  # tokens after the prompt that truth holds
TOLERANCE = 1e-5

_cells: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _count_the_cells(tallies: dict[str, Counter[str]]) -> Iterator[None]:
    _cells.clear()
    yield
    tallies["cells of the grid equal one uncached forward"].update(_cells)


def model_of(window: int) -> Any:
    return F.tiny("three", sliding_window=window)


@functools.lru_cache(maxsize=8)
def truth(window: int, rows: int) -> tuple[Tensor, Tensor]:
    """ids [rows, N] and float64 logits [rows, N, V] of one uncached forward of each row."""
    config = F.config("three", sliding_window=window)
    ids = F.tokens(rows, 2 * window + 3 + EXTRA, seed=window)
    with torch.no_grad():
        return ids, plain.forward(F.state_dict(config), config, ids).logits


@dataclass
class Conversation:
    """A batch that goes through a cache; each row at a length of its own, all checked."""

    window: int
    cache: Any
    rows: int
    mask: Tensor  # [B, columns so far]
    lengths: list[int]

    def feed(self, counts: list[int], side: str, wrong: bool = False) -> None:
        """Feeds the next counts[b] tokens of each row in one call; `wrong` ones are others."""
        ids, logits = truth(self.window, self.rows)
        parts = [
            ids[b, n : n + c] for b, (n, c) in enumerate(zip(self.lengths, counts, strict=True))
        ]
        if wrong:
            parts = [(part + 7) % 90 + 3 for part in parts]
        chunk, mask = F.padded(parts, side)
        self.call(chunk, mask)
        self.advance(mask, None if wrong else logits)

    def call(self, chunk: Tensor, mask: Tensor) -> None:
        self.mask = torch.cat([self.mask, mask], dim=1)
        needs_mask = bool((self.mask == 0).any())
        with torch.no_grad():
            self.out = model_of(self.window)(
                chunk,
                attention_mask=self.mask if needs_mask else None,
                past_key_values=self.cache,
                use_cache=True,
            ).logits

    def advance(self, mask: Tensor, logits: Tensor | None) -> None:
        for b in range(self.rows):
            count = int(mask[b].sum())
            if logits is not None and count:
                want = logits[b, self.lengths[b] : self.lengths[b] + count]
                error = F.relative_error(self.out[b, mask[b].bool()], want)
                assert error < TOLERANCE, (
                    f"row {b}, {count} tokens from {self.lengths[b]} on: {error:.1e}"
                )
            self.lengths[b] += count
        assert torch.isfinite(self.out).all()
        assert self.cache.lengths.tolist() == self.lengths
        assert self.cache.get_seq_length() == max(self.lengths)

    def crop(self, n: int) -> None:
        """A negative crop of every row."""
        self.cache.crop(n)
        self.lengths = [length + n for length in self.lengths]
        self.forget_columns()

    def forget_columns(self) -> None:
        # the caller's mask may hold any columns, so long as they count the cache's tokens
        self.mask = F.padded([torch.ones(n, dtype=torch.long) for n in self.lengths], "left")[1]


def start(window: int, length: int, side: str, chunk: int) -> Conversation:
    """Prefills rows of length, length - 3 and 2 tokens (or three equal ones) by chunks."""
    rows = 3
    lengths = [length] * rows if side == "none" else [length, length - 3, 2]
    config = F.config("three", sliding_window=window)
    cache = gemma2.HybridCache(config, rows, 1024, margin=WINDOWS[window])
    assert cache[0][0].shape[2] == 128 if cache.layers[0].k is not None else True
    talk = Conversation(window, cache, rows, torch.zeros(rows, 0, dtype=torch.long), [0] * rows)
    ids, logits = truth(window, rows)
    prompt, mask = F.padded([ids[b, :n] for b, n in enumerate(lengths)], side)
    for first in range(0, length, chunk):
        talk.call(prompt[:, first : first + chunk], mask[:, first : first + chunk])
        talk.advance(mask[:, first : first + chunk], logits)
    assert talk.lengths == lengths
    return talk


def lengths_around(window: int) -> list[int]:
    return [window - 1, window, window + 1, 2 * window + 3]


def chunk_sizes(window: int) -> list[int]:
    return [1, 3, window, MARGIN[window] + 2]


GRID = [(w, c) for w in WINDOWS for c in chunk_sizes(w)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_uncached_forward(window: int, side: str) -> None:
    ids, logits = truth(window, 3)
    for length in lengths_around(window):
        counts = [length] * 3 if side == "none" else [length, length - 3, 2]
        chunk, mask = F.padded([ids[b, :n] for b, n in enumerate(counts)], side)
        out = model_of(window)(chunk, attention_mask=None if side == "none" else mask).logits
        for b, n in enumerate(counts):
            error = F.relative_error(out[b, mask[b].bool()], logits[b, :n])
            assert error < TOLERANCE, f"length {length}, row {b}: {error:.1e}"
        _cells.append("uncached")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("window", "chunk"), GRID)
def test_chunked_then_continued_then_cropped_twice(window: int, chunk: int, side: str) -> None:
    margin = MARGIN[window]
    for length in lengths_around(window):
        talk = start(window, length, side, chunk)
        _cells.append("chunked")
        # continued: token by token, then ragged, then all rows by several
        talk.feed([1, 1, 1], "left")
        talk.feed([1, 0, 1] if side != "none" else [1, 1, 1], side if side != "none" else "left")
        talk.feed([4, 4, 4], "left")
        _cells.append("continued")
        # cropped: speculated tokens are taken back, as far as the margin lets it
        wrong = min(margin, 12)
        if wrong:
            talk.feed([wrong] * 3, "left", wrong=True)
            talk.crop(-wrong)
        talk.feed([2, 2, 2], "left")
        _cells.append("cropped")
        # ... and again, down to the least possible length, counted from the highest ever written
        highest = [n - 2 + max(wrong, 2) for n in talk.lengths]
        floor = [h - margin if h > 128 else 1 for h in highest]
        least = [max(f, 1) for f in floor]
        talk.cache.crop(torch.tensor(least))
        talk.lengths = least
        talk.forget_columns()
        talk.feed([3, 3, 3], "left")
        talk.feed([1, 1, 1], "left")
        _cells.append("cropped twice")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("window", WINDOWS)
def test_cropped_straight_after_the_prompt(window: int, side: str) -> None:
    for length in lengths_around(window):
        for chunk in (window, MARGIN[window] + 2, 2 * length):
            talk = start(window, length, side, chunk)
            for _ in range(2):
                wrapped = max(talk.lengths) > 128
                drop = MARGIN[window] if wrapped else max(talk.lengths) - 1
                drop = drop if side == "none" else min(drop, 1)  # the shortest row has 2 tokens
                if drop:
                    talk.crop(-drop)
                talk.feed([drop + 1] * 3, "left")
            _cells.append("cropped at once")


@pytest.mark.parametrize("window", [100, 120, 128])
def test_crop_beyond_the_margin_names_the_least_n_and_changes_nothing(window: int) -> None:
    talk = start(window, 2 * window + 3, "none", window)
    least = talk.lengths[0] - MARGIN[window]
    before = [t.clone() for pair in talk.cache for t in pair]
    for n in (least - 1, -MARGIN[window] - 1):
        with pytest.raises(ValueError, match=rf"smallest possible n is {least}\b"):
            talk.cache.crop(n)
    assert talk.cache.lengths.tolist() == talk.lengths
    assert all(
        torch.equal(a, b) for a, b in zip(before, [t for p in talk.cache for t in p], strict=True)
    )
    talk.feed([2, 2, 2], "left")


@pytest.mark.parametrize("max_cache_len", [60, 128, 200, 384])
def test_short_caches_equal_uncached_up_to_their_last_slot(max_cache_len: int) -> None:
    window, rows = 100, 3
    config = F.config("three", sliding_window=window)
    cache = gemma2.HybridCache(config, rows, max_cache_len, margin=28)
    talk = Conversation(window, cache, rows, torch.zeros(rows, 0, dtype=torch.long), [0] * rows)
    total = min(max_cache_len, 240)
    while talk.lengths[0] < total:
        talk.feed([min(50, total - talk.lengths[0])] * rows, "left")
    if total == max_cache_len:
        with pytest.raises(ValueError, match="max_cache_len"):
            talk.feed([1] * rows, "left")


# ---- bits ---------------------------------------------------------------------------------------


def attention_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, window: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Attention of all positions through a ring of `capacity` slots, by chunks."""
    batch, _, length, _ = q.shape
    ring = [torch.zeros(batch, k.shape[1], capacity, k.shape[3], dtype=k.dtype) for _ in range(2)]
    outs, lses = [], []
    for first in range(0, length, chunk):
        s = slice(first, min(first + chunk, length))
        q_start = torch.full((batch,), first)
        kv_len = torch.full((batch,), s.stop)
        ops.cache_write(ring[0], ring[1], k[:, :, s], v[:, :, s], q_start, kv_len)
        out, lse = ops.attention(
            q[:, :, s], ring[0], ring[1], q_start, kv_len,
            scale=0.2, softcap=2.0, window=window, deterministic=True,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [0, 100])
def test_deterministic_attention_has_the_same_bits_in_any_chunking(
    window: int, dtype: torch.dtype
) -> None:
    length, heads, kv_heads, dim = 300, 4, 2, 64
    q = torch.randn(2, heads, length, dim).to(dtype)
    k, v = (torch.randn(2, kv_heads, length, dim).to(dtype) for _ in range(2))
    capacity = 384 if window == 0 else 128
    every = torch.full((2,), length)
    whole, lse = ops.attention(
        q, k, v, torch.zeros(2, dtype=torch.long), every,
        scale=0.2, softcap=2.0, window=window, deterministic=True,
    )  # fmt: skip
    for chunk in (1, 7, 29) if window else (1, 7, 64, 300):
        out, chunk_lse = attention_by_chunks(q, k, v, chunk, window, capacity)
        assert torch.equal(out, whole), f"chunks of {chunk}"
        assert torch.equal(chunk_lse, lse), f"chunks of {chunk}: lse"
    alone, _ = attention_by_chunks(q[1:], k[1:], v[1:], 13, window, capacity)
    assert torch.equal(alone[0], whole[1]), "a row alone"
    torch.set_num_threads(1)
    one_thread, _ = attention_by_chunks(q, k, v, 17, window, capacity)
    assert torch.equal(one_thread, whole), "one thread"
