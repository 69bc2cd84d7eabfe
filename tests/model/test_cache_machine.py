"""HybridCache as a state machine: whatever is done to it, the model's next logits are those of one
uncached float64 forward of each row's text.

Hypothesis draws the calls (chunks with padding and holes, single tokens, documents) and what is
done between them (crop, reorder, reset, snapshot, restore, growth). The model keeps for each
row only its text and where its last document began.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor

from gemma2 import HybridCache
from tests.model import factories as F
from tests.model import plain

LONGEST = 400
CONFIGS = [(8, 64), (100, 28), (120, 8), (128, 0)]  # window, margin: rings of 128 slots


@dataclass
class Row:
    """A row's tokens and, for each, where its document begins; `written` as DESIGN.md counts it."""

    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    written: int = 0

    def copy(self) -> Row:
        return replace(self, tokens=list(self.tokens), starts=list(self.starts))

    def append(self, token: int, new_document: bool) -> None:
        n = len(self.tokens)
        begins = new_document or n == 0
        self.starts.append((n if n else 0) if begins else self.starts[-1])
        self.tokens.append(token)
        self.written = max(self.written, n + 1)


class CacheMachine(RuleBasedStateMachine):
    tolerance = 2e-5  # of a logit, relative to all

    @initialize(sizes=st.sampled_from(CONFIGS), rows=st.integers(1, 3), grows=st.booleans())
    def make(self, sizes: tuple[int, int], rows: int, grows: bool) -> None:
        self.window, margin = sizes
        self.config = F.config("three", sliding_window=self.window)
        self.model = F.tiny("three", sliding_window=self.window)
        self.state = F.state_dict(self.config)
        self.cache = HybridCache(self.config, rows, None if grows else LONGEST, margin=margin)
        self.rows = [Row() for _ in range(rows)]
        self.saved: tuple[Any, list[Row]] | None = None
        self.lowest_write = [LONGEST] * rows  # since the snapshot
        self.calls = 0

    # ---- calls ----------------------------------------------------------------------------------

    def call(self, mask: Tensor, documents: bool, explicit_positions: bool) -> None:
        """Feeds fresh tokens where mask [B, S] is 1, and checks every logit."""
        self.calls += 1
        ids = F.tokens(*mask.shape, seed=self.calls)
        position_ids = torch.ones_like(ids)
        before = [len(row.tokens) for row in self.rows]
        for b, row in enumerate(self.rows):
            if mask[b].any():
                self.lowest_write[b] = min(self.lowest_write[b], before[b])
            for s in mask[b].nonzero()[:, 0].tolist():
                # about one document in six tokens
                row.append(int(ids[b, s]), documents and int(ids[b, s]) % 6 == 0)
                position_ids[b, s] = len(row.tokens) - 1 - row.starts[-1]
        extra = {"position_ids": position_ids} if documents or explicit_positions else {}
        with torch.no_grad():
            out = self.model(
                ids,
                attention_mask=None if mask.all() else mask,
                past_key_values=self.cache,
                **extra,
            ).logits
        assert torch.isfinite(out).all()
        for b, row in enumerate(self.rows):
            fed = len(row.tokens) - before[b]
            if fed:
                got = out[b, mask[b].bool()]
                error = F.relative_error(got, self.truth(row)[-fed:])
                assert error < self.tolerance, (
                    f"row {b}, the last {fed} of {len(row.tokens)}: {error:.1e}"
                )

    def truth(self, row: Row) -> Tensor:
        starts = torch.tensor([row.starts])
        positions = torch.arange(len(row.tokens))[None] - starts
        ids = torch.tensor([row.tokens])
        with torch.no_grad():
            return plain.forward(
                self.state, self.config, ids, positions=positions, documents=starts
            ).logits[0]

    def room(self) -> int:
        return LONGEST - max(len(row.tokens) for row in self.rows)

    def has_documents(self) -> bool:
        return any(row.starts and row.starts[-1] > 0 for row in self.rows)

    @rule(columns=st.sampled_from([1, 1, 2, 5, 9, 30, 129, 150]), explicit=st.booleans())
    def feed(self, columns: int, explicit: bool) -> None:
        columns = min(columns, self.room())
        if columns:
            mask = torch.ones(len(self.rows), columns, dtype=torch.long)
            self.call(mask, False, explicit)

    @rule(data=st.data(), columns=st.sampled_from([1, 3, 8, 40]), documents=st.booleans())
    def feed_with_padding_and_holes(
        self, data: st.DataObject, columns: int, documents: bool
    ) -> None:
        columns = min(columns, self.room())
        if not columns:
            return
        kind = data.draw(st.sampled_from(["left", "right", "holes", "empty rows"]))
        mask = torch.ones(len(self.rows), columns, dtype=torch.long)
        for b in range(len(self.rows)):
            pads = data.draw(st.integers(0, columns))
            if kind == "left":
                mask[b, :pads] = 0
            elif kind == "right":
                mask[b, columns - pads :] = 0
            elif kind == "holes":
                bits = data.draw(st.integers(0, 2**columns - 1))
                mask[b] = torch.tensor([bits >> i & 1 for i in range(columns)])
            elif pads % 2:
                mask[b] = 0
        self.call(mask, documents, False)

    @rule(columns=st.sampled_from([1, 7, 25, 140]))
    def feed_documents(self, columns: int) -> None:
        columns = min(columns, self.room())
        if columns:
            self.call(torch.ones(len(self.rows), columns, dtype=torch.long), True, False)

    # ---- what is done between calls -------------------------------------------------------------

    def floor(self, row: Row) -> int:
        """The least length that a crop may leave (0 is always possible)."""
        layer = self.cache.layers[0]
        wrapped = layer.wraps and row.written > layer.capacity
        return row.written - (layer.capacity - self.window) if wrapped else 0

    def cut(self, row: Row, n: int) -> None:
        del row.tokens[n:], row.starts[n:]
        row.written = row.written if n else 0

    @precondition(lambda self: max(len(r.tokens) for r in self.rows) > 0)
    @rule(data=st.data())
    def crop_each_row(self, data: st.DataObject) -> None:
        lengths = [
            data.draw(st.integers(min(self.floor(row), len(row.tokens)), len(row.tokens)))
            for row in self.rows
        ]
        self.cache.crop(torch.tensor(lengths))
        for row, n in zip(self.rows, lengths, strict=True):
            self.cut(row, n)

    @precondition(lambda self: max(len(r.tokens) for r in self.rows) > 0)
    @rule(n=st.integers(1, 40), negative=st.booleans())
    def crop_all(self, n: int, negative: bool) -> None:
        lengths = [len(row.tokens) for row in self.rows]
        if negative:
            target = [length - n if length else 0 for length in lengths]
        else:
            target = [min(max(lengths) - n, length) for length in lengths]
            if max(lengths) < n:
                return
        allowed = all(
            t == 0 or t >= self.floor(row) for t, row in zip(target, self.rows, strict=True)
        ) and all(t >= 0 for t in target)
        if allowed:
            self.cache.crop(-n if negative else max(lengths) - n)
            for row, t in zip(self.rows, target, strict=True):
                self.cut(row, t)
        else:
            with pytest.raises(ValueError, match=r"crop: .*smallest possible n"):
                self.cache.crop(-n if negative else max(lengths) - n)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        beams = [data.draw(st.integers(0, len(self.rows) - 1)) for _ in self.rows]
        self.cache.reorder(torch.tensor(beams))
        self.saved = None
        self.rows = [self.rows[i].copy() for i in beams]

    @precondition(lambda self: self.calls > 3)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.rows = [Row() for _ in self.rows]

    @rule()
    def snapshot(self) -> None:
        self.saved = self.cache.snapshot(), [row.copy() for row in self.rows]
        self.lowest_write = [LONGEST] * len(self.rows)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self) -> None:
        assert self.saved is not None
        snapshot, rows = self.saved
        lost = any(low < len(row.tokens) for low, row in zip(self.lowest_write, rows, strict=True))
        if lost:
            with pytest.raises(ValueError, match="restore: row"):
                self.cache.restore(snapshot)
        else:
            self.cache.restore(snapshot)
            self.rows = [row.copy() for row in rows]

    @precondition(lambda self: self.cache.max_cache_len < LONGEST)
    @rule(more=st.integers(0, 100))
    def grow(self, more: int) -> None:
        self.cache.grow(min(max(self.cache.max_cache_len + more, 1), LONGEST))

    # ---- always ---------------------------------------------------------------------------------

    @invariant()
    def lengths_are_exact(self) -> None:
        if hasattr(self, "cache"):
            lengths = [len(row.tokens) for row in self.rows]
            assert self.cache.lengths.tolist() == lengths
            assert self.cache.get_seq_length() == max(lengths)


class TestCacheMachine(CacheMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(
        max_examples=120 if os.environ.get("HYPOTHESIS_PROFILE") != "soak" else 1000,
        stateful_step_count=14,
        derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "soak",
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
