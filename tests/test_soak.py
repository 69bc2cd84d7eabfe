"""The soak test itself: it runs, and what it finds can be done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma2 import HybridCache
from tests import soak


def test_some_steps_hold() -> None:
    said: list[str] = []
    assert soak.soak(5.0, seed=1, report=said.append) == 0, said
    (total,) = [line for line in said if line.startswith("seed 1, ")]
    assert int(total.split()[2]) >= 10


def test_a_fault_is_reported_with_steps_that_show_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crop that drops one token more than it was told, where there is one."""
    crop = HybridCache.crop

    def one_more(self: HybridCache, n: Any) -> None:
        crop(self, n)
        if int(self.lengths.min()) > 1:
            crop(self, -1)

    monkeypatch.setattr(HybridCache, "crop", one_more)
    said: list[str] = []
    assert soak.soak(10.0, seed=1, report=said.append) > 0
    start = next(i for i, line in enumerate(said) if line.startswith("FAILED: seed 1"))
    steps = []
    for line in said[start + 2 :]:  # after the traceback
        if not line.startswith("{"):
            break
        steps.append(line)
    assert "crop" in json.loads(steps[-1])["kind"]
    file = tmp_path / "steps"
    file.write_text("\n".join(steps))
    with pytest.raises((AssertionError, ValueError)):
        soak.replay(file)
    monkeypatch.undo()
    soak.replay(file)
