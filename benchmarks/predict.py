"""What the CUDA kernels' plans predict of their speed: a model on paper, not a measurement.

`predict(operator, case, device_name)` gives the seconds of one call, for the cases of the benchmarks;
`python -m benchmarks.predict` prints the tables of docs/kernels.md, which explains the model, and
with --write puts them there. What no data sheet says stands in `Assumed` (gpus.py), with a better
and a worse guess beside the likely one: these make the range. The first measurement is to judge it.
"""

from __future__ import annotations

import functools
import sys
from math import ceil
from typing import Any

from benchmarks.attention_model import BARRIER, Clocks, attention
from benchmarks.gpus import (
    BETTER,
    KB,
    LIKELY,
    SIZES,
    WORSE,
    Assumed,
    Device,
    Result,
    device_of,
    streamed,
)
from gemma2 import Gemma2Config

__all__ = ["OPERATORS", "predict"]

# ---- Kernels that move bytes ---------------------------------------------------------------------------


def linear(case: dict[str, Any], device: Device, assumed: Assumed) -> Result | None:
    """cuBLAS's, or with `deterministic` the fixed order's; both read the weights of few rows."""
    rows, n, k, size = case["rows"], case["n"], case["k"], SIZES[case["dtype"]]
    if size == 4 and rows > 1:
        return None  # cuBLAS's float32 depends on its settings
    moved = size * (n * k + rows * (n + k))
    if rows <= 16:
        return streamed(moved, device, assumed, trips=2)
    if case.get("deterministic"):
        return linear_tile(rows, n, k, moved, device, assumed)
    # Tiles of 128 columns at least: a product of few of them leaves multiprocessors idle.
    filled = min(1.0, ceil(n / 128) * ceil(rows / 128) / device.sms)
    products = 2 * rows * n * k / device.library / filled
    return streamed(moved, device, assumed, trips=2, products=products)


def linear_tile(rows: int, n: int, k: int, moved: int, device: Device, assumed: Assumed) -> Result:
    """csrc/cuda/linear_tile.cu: 128 rows x 64 columns, 4 warps, stages of 64 k."""
    resident = min(2, device.shared // (73 * KB))
    loads = 4 * 2 * 12 * 512  # bytes of a stage: 4 warps, 2 steps, 12 fragments
    parts = {
        "products": 2 * 128 * 64 * 64 / device.products,
        "shared memory": (loads + (128 + 64) * 128) / device.shared_bytes,
    }
    copies = 12 * 8  # instructions: assumed
    exposed = assumed.exposed * 64 / 32
    waiting = max(parts.values()) + exposed + copies / assumed.ipc + BARRIER
    stage = Clocks(parts, waiting, assumed)
    stages, blocks = ceil(k / 64), ceil(rows / 128) * ceil(n / 64)
    share = min(resident, ceil(blocks / device.sms))
    waves = ceil(blocks / (device.sms * share))
    clocks = waves * (stages * stage.among(share) * share + 1500)
    times = stages * blocks / (device.sms * device.clock)
    busy = {name: part * times for name, part in parts.items()}
    out = streamed(moved, device, assumed, products=clocks / device.clock)
    return Result(out.seconds, {**out.parts, **busy, "waiting": waiting / resident * times})


def elements(
    operator: str, case: dict[str, Any], device: Device, assumed: Assumed
) -> Result | None:
    """Kernels that move bytes: what they move, and where a plan says so, instructions an element."""
    size = SIZES[case["dtype"]]
    if operator == "embed":
        return streamed(2 * size * case["tokens"] * case["hidden"], device, assumed, trips=2)
    if operator == "rms_norm":
        tensors = 2 if case["op"] == "rms_norm" else 4
        return streamed(tensors * size * case["rows"] * case["hidden"], device, assumed)
    if operator == "rope":
        q_heads, kv_heads, dim = case["heads"]
        heads = q_heads + kv_heads * (2 if case["op"] == "rope_cache" else 1)
        moved = case["tokens"] * (2 * heads * dim * size + 4 * dim)
        return streamed(moved, device, assumed)
    if operator == "cache_write":
        moved = 2 * case["heads"] * case["tokens"] * case["dim"] * (size + SIZES[case["cache"]])
        return streamed(moved, device, assumed, trips=2)
    if operator == "geglu":
        n = case["rows"] * case["width"]
        return streamed(3 * size * n, device, assumed, issued=n * (35 if size == 4 else 14))
    if operator == "softcap":
        n = case["rows"] * case["vocab"]
        return streamed(2 * size * n, device, assumed, issued=18 * n)
    if operator == "sample":
        return sample(case, device, assumed)
    return None


def sample(case: dict[str, Any], device: Device, assumed: Assumed) -> Result:
    options = case["options"]
    greedy = options.get("temperature") == 0.0
    cut = any(options.get(name) for name in ("top_k", "top_p", "min_p"))
    whole = (
        not options.get("top_k") and cut
    )  # reads the logits twice, the second time cached if they fit
    n = case["rows"] * 256000
    moved = n * SIZES[case["dtype"]]
    reads = 2 if whole and moved > device.l2 else 1
    draws = not greedy and not cut
    # The last launch chooses among what is left, one block a row: steps over it one after another.
    last = assumed.trips * 8 * device.trip / device.clock if cut else 0.0
    out = streamed(
        reads * moved, device, assumed, 3 if whole else 2, issued=n * (30 if draws else 6)
    )
    return Result(out.seconds + last, {**out.parts, "launch": out.parts["launch"] + last})


# ---- The whole model --------------------------------------------------------------------------------

OTHERS = 12  # small kernels of torch in a step: positions, angles, lengths; assumed


def model(case: dict[str, Any], device: Device, assumed: Assumed) -> Result | None:
    """A prompt, or one decode step of all rows at a context of `tokens`, as a CUDA graph runs it."""
    if case["size"] not in ("2b", "9b", "27b") or case["dtype"] == "float32":
        return None
    c = getattr(Gemma2Config, f"gemma2_{case['size']}")()
    batch, tokens, dtype = case["batch"], case["tokens"], case["dtype"]
    queries = tokens if case["kind"] == "prefill" else 1
    rows, heads = batch * queries, (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    order = {"deterministic": case.get("deterministic", False)}
    common = {"rows": rows, "dtype": dtype}
    q, kv = (n * c.head_dim for n in heads[:2])

    def norm(op: str) -> tuple[str, dict[str, Any]]:
        return "rms_norm", {**common, "op": op, "hidden": c.hidden_size}

    def product(n: int, k: int, of: int = rows) -> tuple[str, dict[str, Any]]:
        return "linear", {"rows": of, "n": n, "k": k, "dtype": dtype, **order}

    calls = [("embed", {**common, "tokens": rows, "hidden": c.hidden_size}), norm("rms_norm")]
    for layer in range(c.num_hidden_layers):
        window = c.layer_window(layer)
        asked = {"heads": heads, "batch": batch, "queries": queries, "keys": tokens, **order}
        calls += [
            product(q, c.hidden_size),
            *(2 * [product(kv, c.hidden_size)]),
            ("rope", {**common, "op": "rope_cache", "heads": heads, "tokens": rows}),
            ("attention", {**asked, "window": window if window < tokens else 0, "dtype": dtype}),
            product(c.hidden_size, q),
            norm("add_rms_norm_"),
            *(2 * [product(c.intermediate_size, c.hidden_size)]),
            ("geglu", {**common, "width": c.intermediate_size}),
            product(c.hidden_size, c.intermediate_size),
            norm("add_rms_norm_"),
        ]
    calls += [
        product(c.vocab_size, c.hidden_size, batch),
        ("softcap", {"rows": batch, "vocab": c.vocab_size, "dtype": dtype}),
        ("sample", {"rows": batch, "dtype": dtype, "options": {"temperature": 0.0}}),
    ]
    parts: dict[str, float] = {"launch": OTHERS * streamed(0, device, assumed).seconds}
    seconds = parts["launch"]
    known: dict[str, Result | None] = {}
    for operator, asked in calls:
        key = f"{operator} {asked}"
        result = known.setdefault(key, OPERATORS[operator](asked, device, assumed))
        if result is None:
            return None
        seconds += result.seconds
        for name, part in result.parts.items():
            parts[name] = parts.get(name, 0.0) + part
    return Result(seconds, parts)


OPERATORS: dict[str, Any] = {
    "attention": attention,
    "linear": linear,
    "model": model,
    **{
        name: functools.partial(elements, name)
        for name in ("embed", "rms_norm", "rope", "cache_write", "geglu", "softcap", "sample")
    },
}


def predict(operator: str, case: dict[str, Any], device_name: str) -> dict[str, Any] | None:
    """Predict the seconds of one call of ours; None for what the model does not know.

    Args:
        operator: the benchmark's name.
        case: one of its cases; attention may have `deterministic`.
        device_name: as torch gives it, such as "NVIDIA H100 80GB HBM3".

    Returns:
        "seconds"; "low" and "high", between which the model believes them; "bound", the resource
        that takes longest alone, and "parts", the seconds of each.
    """
    device = device_of(device_name)
    if device is None or operator not in OPERATORS or case.get("dtype", "bfloat16") not in SIZES:
        return None
    try:
        results = [OPERATORS[operator](case, device, a) for a in (LIKELY, BETTER, WORSE)]
    except KeyError:  # a case of another benchmark of this name
        return None
    if results[0] is None:
        return None
    likely, better, worse = results
    return {
        "seconds": likely.seconds,
        "low": better.seconds,
        "high": worse.seconds,
        "bound": likely.bound,
        "parts": likely.parts,
    }


if __name__ == "__main__":
    from benchmarks.predicted import main

    sys.exit(main())
