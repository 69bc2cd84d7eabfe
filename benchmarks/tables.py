"""What of a benchmark's rows a page has room for: ours, the peers, ratios, the share of a limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gemma2.bench import markdown

__all__ = ["compact"]

# Of ours alone; what is left of a row's values stands in the lines of results.
_OURS = ("ours us median", "ours GFLOP/s", "ours GB/s", "ours tokens/s")
_LEFT_OUT = (" us median", " GFLOP/s", " GB/s", " tokens/s")


def _kept(name: str) -> bool:
    return name in _OURS or not name.endswith(_LEFT_OUT)


def compact(rows: Iterable[Mapping[str, Any]]) -> str:
    """Give a Markdown table of the rows, without columns that would be empty.

    Times are the best ones, of ours the median, too. What a case is comes first, then times in us,
    ratios "x <peer>" (above 1 ours is faster), rates and shares, the prediction, and whatever else
    a benchmark notes.
    """
    shown = []
    for row in rows:
        line = {}
        for name, value in row.items():
            if not _kept(name):
                continue
            if name == "ours GFLOP/s" and isinstance(value, float) and value >= 1000:
                name, value = "ours TFLOP/s", value / 1000
            line[name] = value
        shown.append(line)
    names = dict.fromkeys(name for line in shown for name in line)
    ordered = sorted(names, key=_rank)
    kept = [name for name in ordered if any(line.get(name) not in (None, "") for line in shown)]
    return markdown([{name: line.get(name) for name in kept} for line in shown])


def _rank(name: str) -> int:
    """Give where a column stands: sorting is stable, so each kind keeps its order."""
    kinds: tuple[bool, ...] = (
        name.startswith(("predicted", "measured", "bound")),
        name.endswith((" us", " us median")),
        name.startswith("x "),
        name.startswith("ours ") and name.endswith("/s"),
        name.startswith("share of "),
        name.endswith((" error", " GB", "cold", "not timed", "trouble")),
    )
    order = (5, 1, 2, 3, 4, 6)
    return next((rank for rank, is_kind in zip(order, kinds, strict=True) if is_kind), 0)
