"""The tables of docs/kernels.md, from the model in predict.py: `python -m benchmarks.predict`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.attention_model import Attention, Tile, tile_of
from benchmarks.gpus import A100, BETTER, DEVICES, H100, LIKELY, WORSE, Device, Result
from benchmarks.predict import OPERATORS

TODAY = tile_of(256)
WIDE = replace(TODAY, rows=128, limit=1)
CHANGES = {
    "as it is": TODAY,
    "tanh.approx (2 functions a score)": replace(TODAY, special=2, float_ops=4),
    "a polynomial for a third of the exp2": replace(TODAY, special=7 / 3, float_ops=11),
    "S of the next tile beside exp2": replace(TODAY, pipelined=True),
    "32 rows a warp, D shared by 2 warps": replace(TODAY, warp_rows=32, sharing=2),
    "128 rows, 8 warps": WIDE,
    "128 rows, 8 warps, 32 rows a warp": replace(WIDE, warp_rows=32, sharing=2),
}
# FlashAttention-2's tiles (flash_fwd_launch_template.h) and what was published of them, without a cap:
# FA3's figure of forward passes (assets/flash3_fp16_fwd.png); arXiv 2307.08691: up to 73% of 312.
_FA2 = Tile(256, special=1, float_ops=7)
PUBLISHED = (
    ("H100, head_dim 256: 64 x 64, 4 warps, 2 blocks", H100, _FA2, 298.0),
    (
        "A100, head_dim 128: 128 x 64, 4 warps, 2 blocks",
        A100,
        replace(_FA2, dim=128, rows=128, warp_rows=32, float_ops=5),
        228.0,
    ),
)


def tile_rate(tile: Tile, device: Device) -> float:
    """TFLOP per second of tiles that all rows see."""
    flop = 4 * tile.rows * tile.keys * tile.dim
    return (
        flop
        / tile.clocks(device, LIKELY).among(tile.resident(device))
        * device.sms
        * device.clock
        / 1e12
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def _results(operator: str, case: dict[str, Any], device: Device) -> list[Result]:
    return [OPERATORS[operator](case, device, assumed) for assumed in (LIKELY, BETTER, WORSE)]


def _range(values: Iterable[float], digits: int = 3) -> str:
    """`12 (10 - 15)`."""
    likely, *others = (float(f"{v:.{digits}g}") for v in values)
    low, high = sorted(others)
    return f"{likely:g} ({low:g} - {high:g})"


def _attention(
    heads: tuple[int, int, int], queries: int, keys: int, window: int = 0, batch: int = 1
) -> dict[str, Any]:
    return {
        "heads": heads, "batch": batch, "queries": queries, "keys": keys, "window": window,
        "dtype": "bfloat16",
    }  # fmt: skip


def tile_table() -> str:
    rows = []
    for name, device in DEVICES.items():
        clocks = TODAY.clocks(device, LIKELY)
        busy = (f"{value:.0f}" for value in clocks.parts.values())
        resident = TODAY.resident(device)
        rate = f"{tile_rate(TODAY, device):.0f}"
        rows.append(
            (name, *busy, f"{clocks.waiting:.0f}", resident, f"{clocks.among(resident):.0f}", rate)
        )
    units = TODAY.clocks(H100, LIKELY).parts
    head = ("clocks of a tile", *units, "one block alone", "blocks", "predicted", "TFLOP/s")
    return _table(head, rows)


def prefill_table() -> str:
    shapes = [
        ("2B, 2048", _attention((8, 4, 256), 2048, 2048)),
        ("2B, 8192", _attention((8, 4, 256), 8192, 8192)),
        ("2B, 8192, window 4096", _attention((8, 4, 256), 8192, 8192, 4096)),
        ("2B, 32768", _attention((8, 4, 256), 32768, 32768)),
        ("27B, 8192", _attention((32, 16, 128), 8192, 8192)),
    ]

    def cell(case: dict[str, Any], device: Device) -> str:
        results = _results("attention", case, device)
        a = Attention.of(case)
        rates = [4 * a.dim * a.pairs / r.seconds / 1e12 for r in results]
        return f"{results[0].seconds * 1e3:.3g} ms; {_range(rates)}"

    rows = ((text, *(cell(case, d) for d in DEVICES.values())) for text, case in shapes)
    return _table(("time; TFLOP/s (range)", *DEVICES), rows)


def decode_table() -> str:
    def cell(case: dict[str, Any], device: Device) -> str:
        return _range(r.seconds * 1e6 for r in _results("attention", case, device))

    rows = (
        (f"{keys} keys, batch {batch}", *(cell(_attention((8, 4, 256), 1, keys, 0, batch), d)
         for d in DEVICES.values()))
        for keys, batch in ((1024, 1), (8192, 1), (8192, 8), (32768, 1))
    )  # fmt: skip
    return _table(("us (range)", *DEVICES), rows)


def other_table() -> str:
    bf16 = {"dtype": "bfloat16"}
    calls = [
        ("embed, 1 token", "embed", {"tokens": 1, "hidden": 2304}),
        ("rms_norm, 1 x 2304", "rms_norm", {"op": "rms_norm", "rows": 1, "hidden": 2304}),
        ("add_rms_norm, 512 x 2304", "rms_norm", {"op": "add", "rows": 512, "hidden": 2304}),
        ("rope_cache, 1 token", "rope", {"op": "rope_cache", "heads": (8, 4, 256), "tokens": 1}),
        ("geglu, 512 x 9216", "geglu", {"rows": 512, "width": 9216}),
        ("softcap, 1 x 256000", "softcap", {"rows": 1, "vocab": 256000}),
        ("sample greedy, 1 row", "sample", {"rows": 1, "options": {"temperature": 0.0}}),
        ("sample top-k 50, 1 row", "sample", {"rows": 1, "options": {"top_k": 50}}),
        ("linear, 1 row, 9216 x 2304", "linear", {"rows": 1, "n": 9216, "k": 2304}),
        ("linear, 1 row, 256000 x 2304", "linear", {"rows": 1, "n": 256000, "k": 2304}),
    ]
    rows = (
        (text, *(_range(r.seconds * 1e6 for r in _results(operator, {**case, **bf16}, d))
         for d in DEVICES.values()))
        for text, operator, case in calls
    )  # fmt: skip
    return _table(("us (range)", *DEVICES), rows)


def model_table() -> str:
    kinds = [("prefill", 512), ("prefill", 8192), ("decode", 512), ("decode", 8192)]

    def cell(size: str, kind: str, tokens: int, device: Device) -> str:
        case = {"size": size, "kind": kind, "batch": 1, "tokens": tokens, "dtype": "bfloat16"}
        made = tokens if kind == "prefill" else 1
        return _range(made / r.seconds for r in _results("model", case, device))

    rows = (
        (f"{size.upper()}, {kind}, {tokens}",
         *(cell(size, kind, tokens, d) for d in DEVICES.values()))
        for size in ("2b", "9b")
        for kind, tokens in kinds
    )  # fmt: skip
    return _table(("tokens/s (range)", *DEVICES), rows)


def price_table() -> str:
    bf16 = {"dtype": "bfloat16", "batch": 1, "size": "2b"}
    calls = [
        ("attention, prefill, 2B, 8192", "attention", _attention((8, 4, 256), 8192, 8192)),
        ("attention, decode, 2B, 1024 keys", "attention", _attention((8, 4, 256), 1, 1024)),
        ("attention, decode, 2B, 8192 keys", "attention", _attention((8, 4, 256), 1, 8192)),
        ("linear, 1 row, 9216 x 2304", "linear", {"rows": 1, "n": 9216, "k": 2304}),
        ("linear, 512 rows, 9216 x 2304", "linear", {"rows": 512, "n": 9216, "k": 2304}),
        ("linear, 8192 rows, 9216 x 2304", "linear", {"rows": 8192, "n": 9216, "k": 2304}),
        ("2B, prefill of 8192", "model", {"kind": "prefill", "tokens": 8192}),
        ("2B, a decode step at 512", "model", {"kind": "decode", "tokens": 512}),
        ("2B, a decode step at 8192", "model", {"kind": "decode", "tokens": 8192}),
    ]

    def cell(operator: str, case: dict[str, Any], device: Device) -> str:
        usual, fixed = (
            OPERATORS[operator]({**bf16, **case, "deterministic": on}, device, LIKELY).seconds
            for on in (False, True)
        )
        return f"{fixed / usual:.2g}"

    rows = (
        (text, *(cell(operator, case, d) for d in DEVICES.values()))
        for text, operator, case in calls
    )
    return _table(("times as long, deterministic", *DEVICES), rows)


def change_table() -> str:
    def cell(tile: Tile, device: Device) -> str:
        return f"{tile_rate(tile, device):.0f}" if tile.resident(device) else "does not fit"

    devices = {name: d for name, d in DEVICES.items() if name != "H200"}
    rows = ((name, *(cell(tile, d) for d in devices.values())) for name, tile in CHANGES.items())
    return _table(("TFLOP/s of tiles, head_dim 256", *devices), rows)


def published_table() -> str:
    rows = (
        (name, f"{tile_rate(tile, device):.0f}", f"{published:.0f}")
        for name, device, tile, published in PUBLISHED
    )
    return _table(("FlashAttention-2, no cap", "the model", "published"), rows)


TABLES = {
    "tile": tile_table,
    "published": published_table,
    "prefill": prefill_table,
    "changes": change_table,
    "decode": decode_table,
    "price": price_table,
    "others": other_table,
    "model": model_table,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description="Prints what the kernels should reach."
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this file")
    args = parser.parse_args(argv)
    for name, make in TABLES.items():
        if args.write is None:
            print(f"Predicted, not measured: {name}\n\n{make()}\n")
            continue
        marks = f"(<!-- predicted: {name} -->\n).*?(<!-- end -->)"
        text = args.write.read_text()
        args.write.write_text(re.sub(marks, rf"\g<1>{make()}\n\g<2>", text, count=1, flags=re.S))
    return 0
