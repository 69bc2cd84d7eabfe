"""The table of what the CUDA kernels do, counted by the emulator: `python -m tests.cuda.counters`.

For each kernel, at a shape of Gemma 2 2B with few rows: the bytes that must move (each input read
once, each output written once), the bytes that do, how well requests fill their sectors of 32 bytes,
bank conflicts in shared memory, barriers, and products of tensor cores beside the fewest that hold all
that is visible. Operators' names after it restrict the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.bench import markdown
from tests.cuda.emulation import Emulator, operators_library

BF16 = torch.bfloat16
ROWS = 4


class Case(NamedTuple):
    operator: str
    what: str
    least: int  # bytes
    call: Callable[[], object]
    written: tuple[Tensor, ...] = ()  # in place
    products: float = 0  # of 16 x 8 x 16, that the result needs; 0: not counted


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def cases() -> Iterator[Case]:
    hidden, width, vocab = 2304, 9216, 256000
    x, h = torch.randn(2, ROWS, hidden).to(BF16)
    post, pre = torch.randn(2, hidden).to(BF16)
    table, ids = torch.randn(64, hidden).to(BF16), torch.arange(ROWS)
    yield Case(
        "embed",
        f"{ROWS} x {hidden}",
        2 * _bytes(x) + _bytes(ids),
        lambda: ops.embed(ids, table, 48.0),
    )
    yield Case(
        "rms_norm", f"{ROWS} x {hidden}", 2 * _bytes(x) + _bytes(pre), lambda: ops.rms_norm(x, pre)
    )
    yield Case(
        "add_rms_norm",
        f"{ROWS} x {hidden}",
        4 * _bytes(x) + _bytes(post, pre),
        lambda: ops.add_rms_norm_(h, x, post, pre),
        (h,),
    )

    def projected(heads: int) -> Tensor:
        return torch.randn(1, ROWS, heads, 256).to(BF16).transpose(1, 2)

    q, k, v = projected(8), projected(4), projected(4)
    cos, sin = ops.rope_table(torch.arange(ROWS)[None], 256)
    caches = torch.zeros(2, 1, 4, 4224, 256, dtype=BF16)
    start, end = torch.tensor([1000]), torch.tensor([1000 + ROWS])
    shape = f"{ROWS} x (8 + 4) x 256"
    yield Case("rope", shape, 2 * _bytes(q, k) + _bytes(cos, sin), lambda: ops.rope(q, k, cos, sin))
    yield Case(
        "rope_cache",
        shape,
        2 * _bytes(q, k, v) + _bytes(cos, sin, start, end),
        lambda: ops.rope_cache(q, k, v, cos, sin, *caches, start, end),
        tuple(caches),
    )
    yield Case(
        "cache_write",
        f"{ROWS} x 4 x 256",
        2 * _bytes(k, v) + _bytes(start, end),
        lambda: ops.cache_write(*caches, k, v, start, end),
        tuple(caches),
    )
    # Decode of one token and of ROWS drafts, and a prompt, laid out as a model has them.
    for queries, keys in ((1, 1000), (ROWS, 1000), (200, 200)):
        qkv = [
            torch.randn(1, n, heads, 256).to(BF16).transpose(1, 2)
            for n, heads in ((queries, 8), (keys, 4), (keys, 4))
        ]
        at = torch.tensor([keys - queries]), torch.tensor([keys])
        pairs = 8 * sum(range(keys - queries + 1, keys + 1))
        yield Case(
            "attention",
            f"{queries} x 8 x 256, {keys} x 4 keys",
            _bytes(qkv[0], *qkv, *at) + 4 * 8 * queries,
            lambda qkv=qkv, at=at: ops.attention(*qkv, *at, scale=1 / 16, softcap=50.0),
            products=2 * pairs * 256 / (16 * 8 * 16),
        )
    gate, up = torch.randn(2, ROWS, width).to(BF16)
    yield Case("geglu", f"{ROWS} x {width}", 3 * _bytes(gate), lambda: ops.geglu(gate, up))
    weight = torch.randn(1024, hidden).to(BF16)
    for rows in (1, 8, 16):
        few = torch.randn(rows, hidden).to(BF16)
        yield Case(
            "linear",
            f"{rows} x {hidden} -> 1024",
            _bytes(few, weight) + 2 * rows * 1024,
            lambda few=few: torch.ops.gemma2.linear(few, weight),
        )
    logits = (torch.randn(1, vocab) * 3).to(BF16)
    yield Case("softcap", f"1 x {vocab}", 2 * _bytes(logits), lambda: ops.softcap(logits, 30.0))
    capped = ops.softcap(logits, 30.0)
    step = torch.zeros((), dtype=torch.int64)
    history = torch.randint(0, vocab, (1, 64))
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"top_k": 50},
        {"top_k": 256},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"repetition_penalty": 1.2, "top_k": 50},
    ):
        said = ", ".join(f"{name} {value}" for name, value in options.items())
        yield Case(
            "sample",
            f"1 x {vocab}, {said}",
            _bytes(logits) + 16,
            lambda options=options: ops.sample(capped, history, 0, step, **options),
        )


def row(case: Case, counters: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, from the counters of all kernels that the call launched."""
    kernels = counters.values()
    traffic = [k[which] for k in kernels for which in ("global_read", "global_write")]
    moved = 32 * sum(t["distinct"] for t in traffic)
    products = sum(k["instructions"].get("mma_16x8x16", 0) for k in kernels)
    return {
        "operator": case.operator,
        "shape": case.what,
        "launches": sum(k["launches"] for k in kernels),
        "least bytes": case.least,
        "moved": moved,
        "moved / least": f"{moved / case.least:.2f}",
        "bytes a request": f"{sum(t['bytes'] for t in traffic) / sum(t['requests'] for t in traffic):.0f}",
        "bank conflicts": sum(b["conflicts"] for k in kernels for b in k["shared"].values()),
        "barriers a block": f"{sum(k['barriers'] / k['blocks'] for k in kernels):.0f}",
        "products / least": f"{products / case.products:.2f}" if case.products else "",
    }


def main(names: list[str]) -> int:
    emulator = Emulator()
    emulator.library.gemma2_emulate_linear(True)
    rows = []
    torch.manual_seed(0)
    for case in cases():
        if names and case.operator not in names:
            continue
        emulator.install(operators_library())
        with emulator.counting() as counters:
            case.call()
        emulator.uninstall(operators_library())
        rows.append(row(case, counters))
    print(markdown(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
