"""JSON as a hostile file may spell it: keys given twice, numbers beyond all bounds, deep nesting."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


class Pairs(list[tuple[str, Any]]):
    """A JSON object; unlike a dictionary it may name a key twice."""


@dataclass(frozen=True)
class Raw:
    """Text that stands in a document as it is."""

    text: str

    def __repr__(self) -> str:
        return f"Raw({self.text[:40]!r}, {len(self.text)} characters)"


def parse(content: bytes) -> Any:
    return json.loads(content, object_pairs_hook=Pairs)


def text_of(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{text_of(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "1e999" if value > 0 else "-1e999" if value < 0 else "NaN"
    return json.dumps(value)


def bytes_of(value: Any) -> bytes:
    return text_of(value).encode("utf-8", "surrogatepass")


def _nested(depth: int, opening: str) -> Raw:
    closing = {"[": "]", '{"a":': "}"}[opening]
    return Raw(opening * depth + "0" + closing * depth)


_PLAIN: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 16, 2**24, 2**31 - 1, 2**31, 2**32, 2**53 + 1,
    2**63 - 1, 2**63, 2**64, 2**70, -(2**63), 10**400, 0.5, -0.0, 1.0, 1e-320, 1e308,
    "", "a", "0", "1", "NaN", "float32", "bfloat16", "full_attention", "<bos>", [], [0], [[]], Pairs(),
    Pairs([("a", 0)]), Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("-Infinity"), Raw("1" * 5000),
    Raw("0x10"), Raw("nul"), Raw("'a'"), Raw(""), Raw('"a" "b"'), Raw("01"), Raw("1."), Raw('"\t"'),
    Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw("//"),
]  # fmt: skip
_NAMES = [
    "../x.safetensors", "/etc/passwd", "C:\\x.bin", "a\0b", "x\0.safetensors", "\n  all is well",
    "\u202egnp.exe", "model.safetensors", "a/b.bin", "..", ".", "~", "-rf", "CON", "%s%n", "{0}",
    "\x1b[2J", "e\u0301.bin", "x" * 300, "model.norm.weight", "lm_head.weight", "__metadata__",
]  # fmt: skip


def names() -> st.SearchStrategy[str]:
    return st.sampled_from(_NAMES) | st.text(max_size=12) | st.just("n" * 10_000)


_LARGE = [
    *(_nested(depth, "[") for depth in (60, 400, 990, 3000, 100_000)),
    *(_nested(depth, '{"a":') for depth in (60, 400, 990, 3000, 100_000)),
    Raw('"' + "x" * 10_000_000 + '"'),
    Raw("[" + "[]," * 600_000 + "0]"),
    Raw("{" + ",".join(f'"{i}":{i}' for i in range(20_000)) + "}"),
    Raw("[" + "0," * 5000 + "0]"),
]
_SMALL = st.one_of(
    st.sampled_from(_PLAIN),
    names(),
    st.integers(-4, 300),
    st.integers(),
    st.floats(),
    st.lists(st.integers(-1, 20), max_size=5),
)
_HOSTILE = st.integers(0, 19).flatmap(lambda roll: st.sampled_from(_LARGE) if roll == 0 else _SMALL)


def hostile() -> st.SearchStrategy[Any]:
    """A JSON value that a reader does not wait for, most of them small."""
    return _HOSTILE


def show(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def _places(value: Any, at: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """All containers inside `value`, as the indices that lead to them."""
    found = []
    if isinstance(value, list):
        found.append(at)
        for i, item in enumerate(value[:300]):
            found += _places(item[1] if isinstance(value, Pairs) else item, (*at, i))
    return found


def edit(draw: st.DrawFn, document: Any, said: list[str]) -> Any:
    """Change one entry of one container of the document, in place."""
    if not isinstance(document, list):
        return draw(hostile())
    place = draw(st.sampled_from(_places(document)))
    holder = document
    for i in place:
        holder = holder[i][1] if isinstance(holder, Pairs) else holder[i]
    new = draw(hostile())
    action = draw(st.sampled_from(["set", "set", "set", "remove", "repeat", "insert", "rename"]))
    if not holder or action == "insert":
        key = draw(names())
        holder.append((key, new) if isinstance(holder, Pairs) else new)
        said.append(f"insert {show(key)}: {show(new)} at {place}")
        return document
    i = draw(st.integers(0, len(holder) - 1))
    old = holder[i]
    if action == "remove":
        del holder[i]
    elif action == "repeat":
        other = draw(st.booleans())
        again = (old[0], new) if isinstance(holder, Pairs) and other else old
        holder.insert(draw(st.integers(0, len(holder))), again)
    elif action == "rename" and isinstance(holder, Pairs):
        holder[i] = (draw(names()), old[1])
    else:
        holder[i] = (old[0], new) if isinstance(holder, Pairs) else new
    said.append(f"{action} {show(old)} at {(*place, i)}, new: {show(new)}")
    return document


def copied(document: Any) -> Any:
    """A copy in which containers may be changed."""
    if isinstance(document, Pairs):
        return Pairs((key, copied(value)) for key, value in document)
    if isinstance(document, list):
        return [copied(item) for item in document]
    return document
