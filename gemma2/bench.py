"""Measuring: the timing loop, the machine, tables, and what `gemma2 bench` runs.

Speeds on a shared machine move by a fifth and more: everything gives the minimum and the median,
and only numbers of one run are to be compared. Comparisons with other libraries are in the source
tree's `benchmarks/`.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemma2
from gemma2 import _C, Gemma2Config, Gemma2ForCausalLM, HybridCache, ops

__all__ = [
    "OPERATORS",
    "Timing",
    "bench_model",
    "bench_operators",
    "cache_bytes",
    "cpu_name",
    "gpu",
    "machine",
    "markdown",
    "measure",
    "peak_memory",
    "random_model",
]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the shortest and the median of `runs`."""

    min: float
    median: float
    runs: int


# What is timed at once on a GPU, where the clock is read from events that cost microseconds.
_BATCH_SECONDS = 5e-4


def measure(
    call: Callable[[], object],
    seconds: float = 0.5,
    least: int = 5,
    warm_up: int = 2,
    device: torch.device | str = "cpu",
) -> Timing:
    """Time `call` again and again, for `seconds` and at least `least` times, after a warm-up.

    On the CPU each call is timed alone. On a CUDA device as many calls as fill half a millisecond
    are timed together, between two events on the current stream, and `min` and `median` are those of
    the batches' means; `runs` counts calls.
    """
    cuda = torch.device(device).type == "cuda"
    batch = _between_events(call) if cuda else _by_the_clock(call)
    for _ in range(warm_up):
        call()
    return _measure(batch, seconds, least, _BATCH_SECONDS if cuda else 0.0)


def _measure(
    batch: Callable[[int], float], seconds: float, least: int, batch_seconds: float
) -> Timing:
    """Time batches; `batch(n)` runs n calls and gives the seconds they took."""
    n = 1
    if batch_seconds > 0:
        one = batch(1)
        n = max(1, min(1000, math.ceil(batch_seconds / max(one, 1e-7))))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        times.append(batch(n) / n)
    return Timing(min(times), statistics.median(times), n * len(times))


def _by_the_clock(call: Callable[[], object]) -> Callable[[int], float]:
    def batch(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return time.perf_counter() - start

    return batch


def _between_events(call: Callable[[], object]) -> Callable[[int], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def batch(n: int) -> float:
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return batch


def peak_memory() -> int:
    """Give the most memory this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def cpu_name() -> str:
    """Give the processor's name as the system knows it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu(device: torch.device | str = "cuda") -> dict[str, Any]:
    """Give a CUDA device's name, size, driver and clocks; what cannot be asked for is left out."""
    known = torch.cuda.get_device_properties(torch.device(device))
    found: dict[str, Any] = {
        "gpu": known.name,
        "compute capability": f"{known.major}.{known.minor}",
        "multiprocessors": known.multi_processor_count,
        "gpu memory GB": round(known.total_memory / 1e9, 1),
        "L2 MB": round(known.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
    }
    # By its UUID, since CUDA_VISIBLE_DEVICES renumbers devices for torch alone.
    uuid = getattr(known, "uuid", None)
    command = ["nvidia-smi", *([f"--id=GPU-{uuid}"] if uuid else [])]
    names = {
        "driver": "driver_version",
        "SM MHz": "clocks.sm",
        "SM MHz at most": "clocks.max.sm",
        "memory MHz": "clocks.mem",
        "power limit": "power.limit",
    }
    command += [f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {**found, "nvidia-smi": f"not run: {error}"}
    values = answer.stdout.splitlines()[0].split(",") if answer.stdout else []
    return {**found, **{n: v.strip() for n, v in zip(names, values, strict=False)}}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Give what a figure needs beside it: the machine, the versions, the threads, the day.

    For a CUDA device the GPU, its driver and its clocks at this moment, too.
    """
    return {
        **(gpu(device) if torch.device(device).type == "cuda" else {}),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemma2": gemma2.__version__,
        "compiler": _C.build_info()["compiler"],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cell(value: object) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    """Give a table of the rows; the columns are all of their keys, in order of appearance."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(names), rule, *map(line, cells[1:])])


def cache_bytes(config: Gemma2Config, tokens: int, dtype: torch.dtype) -> int:
    """Give the bytes of a cache for one row of `tokens`: rings on sliding layers."""
    slots = sum(layer.capacity for layer in HybridCache(config, 1, tokens).layers)
    return 2 * slots * config.num_key_value_heads * config.head_dim * dtype.itemsize


# ---- the whole model ----------------------------------------------------------------------------


def random_model(
    config: Gemma2Config,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Gemma2ForCausalLM:
    """Give a causal model, made on `device`, whose weights are one random block again and again.

    The numbers do not matter for speed, and drawing billions of them would take minutes.
    """
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    block = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)) * 0.02
    block = block.to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for first in range(0, flat.numel(), block.numel()):
                piece = flat[first : first + block.numel()]
                piece.copy_(block[: piece.numel()])
    return model.eval()


def bench_model(
    model: Gemma2ForCausalLM,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    runs: int = 3,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Time `model.stream` on a random prompt of one row.

    The prompt's time includes the first new token, as a user waits for it; decoding is the rest.

    Returns:
        tokens/s "prefill" and "decode", best and median, the peak memory and what was run.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    prefill, decode = [], []
    for run in range(runs):
        progress(f"run {run + 1} of {runs}")
        start = time.perf_counter()
        stream = model.stream(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[])
        next(stream)
        first = time.perf_counter()
        steps = sum(1 for _ in stream)
        end = time.perf_counter()
        prefill.append(prompt_tokens / (first - start))
        if steps:
            decode.append(steps / (end - first))
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "prefill_tokens_per_s": max(prefill),
        "prefill_tokens_per_s_median": statistics.median(prefill),
        "decode_tokens_per_s": max(decode, default=math.nan),
        "decode_tokens_per_s_median": statistics.median(decode) if decode else math.nan,
        "peak_memory_gb": peak_memory() / 1e9,
    }


# ---- operators ----------------------------------------------------------------------------------

OPERATORS = (
    "embed",
    "rms_norm",
    "add_rms_norm",
    "rope",
    "rope_cache",
    "attention",
    "geglu",
    "linear",
    "softcap",
    "sample",
)


def _operator_cases(
    config: Gemma2Config, dtype: torch.dtype, context: int
) -> dict[str, tuple[str, Callable[[], object], float, float]]:
    """Give for each operator: shape, call, floating-point operations, bytes moved at least."""
    size = torch.empty((), dtype=dtype).element_size()
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = 128  # tokens of the prefill shapes
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, one = rand(rows, hidden), rand(1, hidden)
    wide = rand(rows, inner)
    w_up = rand(inner, hidden) * 0.02
    norm = rand(hidden)
    ids = torch.randint(vocab, (1, rows), generator=generator)
    table = rand(min(vocab, 2**16), hidden)
    q, q_one = rand(1, heads, rows, dim), rand(1, heads, 1, dim)
    k, v = rand(1, kv_heads, context, dim), rand(1, kv_heads, context, dim)
    k_new, v_new = rand(1, kv_heads, rows, dim), rand(1, kv_heads, rows, dim)
    at = torch.arange(context - rows, context)[None]
    cos, sin = ops.rope_table(at, dim, config.rope_theta)
    whole = torch.tensor([context])
    rule: dict[str, Any] = {
        "scale": config.query_scale,
        "softcap": config.attn_logit_softcapping or 0.0,
    }
    logits = rand(1, vocab)
    step = torch.zeros((), dtype=torch.int64)
    pairs = heads * (rows * context - rows * (rows - 1) / 2)  # visible (query, key) pairs
    kv_bytes = 2.0 * kv_heads * context * dim * size
    chunk = [context - rows]
    return {
        "embed": (
            f"{rows} x {hidden}",
            lambda: ops.embed(ids % table.shape[0], table, hidden**0.5),
            0.0,
            2.0 * rows * hidden * size,
        ),
        "rms_norm": (
            f"{rows} x {hidden}",
            lambda: ops.rms_norm(x, norm),
            4.0 * x.numel(),
            2.0 * x.numel() * size,
        ),
        "add_rms_norm": (
            f"{rows} x {hidden}",
            lambda: ops.add_rms_norm(x, x, norm, norm),
            9.0 * x.numel(),
            4.0 * x.numel() * size,
        ),
        "rope": (
            f"{heads}+{kv_heads} heads x {rows} x {dim}",
            lambda: ops.rope(q, k_new, cos, sin),
            3.0 * (q.numel() + k_new.numel()),
            2.0 * (q.numel() + k_new.numel()) * size,
        ),
        "rope_cache": (
            f"{heads}+{kv_heads} heads x {rows} x {dim}",
            lambda: ops.rope_cache(q, k_new, v_new, cos, sin, k, v, torch.tensor(chunk), whole),
            3.0 * (q.numel() + k_new.numel()),
            2.0 * (q.numel() + 2 * k_new.numel()) * size,
        ),
        "attention, prefill": (
            f"{heads}/{kv_heads} heads, {rows} x {context} x {dim}",
            lambda: ops.attention(q, k, v, torch.tensor(chunk), whole, **rule),
            4.0 * dim * pairs,
            kv_bytes + 2.0 * q.numel() * size,
        ),
        "attention, decode": (
            f"{heads}/{kv_heads} heads, 1 x {context} x {dim}",
            lambda: ops.attention(q_one, k, v, whole - 1, whole, **rule),
            4.0 * dim * heads * context,
            kv_bytes,
        ),
        "geglu": (
            f"{rows} x {inner}",
            lambda: ops.geglu(wide, wide),
            10.0 * wide.numel(),
            3.0 * wide.numel() * size,
        ),
        "linear, prefill": (
            f"{rows} x {hidden} x {inner}",
            lambda: ops.linear(x, w_up),
            2.0 * rows * w_up.numel(),
            float(w_up.numel() + x.numel() + wide.numel()) * size,
        ),
        "linear, decode": (
            f"1 x {hidden} x {inner}",
            lambda: ops.linear(one, w_up),
            2.0 * w_up.numel(),
            float(w_up.numel()) * size,
        ),
        "softcap": (
            f"{vocab}",
            lambda: ops.softcap(logits, 30.0),
            3.0 * vocab,
            2.0 * vocab * size,
        ),
        "sample, greedy": (
            f"{vocab}",
            lambda: ops.sample(logits, None, 0, step, 0.0, 0, 1.0, 0.0, 1.0),
            float(vocab),
            float(vocab * size),
        ),
        "sample, top-k 50": (
            f"{vocab}",
            lambda: ops.sample(logits, None, 0, step, 1.0, 50, 1.0, 0.0, 1.0),
            2.0 * vocab,
            float(vocab * size),
        ),
    }


def bench_operators(
    config: Gemma2Config,
    dtype: torch.dtype = torch.bfloat16,
    names: Sequence[str] = (),
    context: int = 2048,
    seconds: float = 0.3,
    progress: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Time the operators at the model's shapes; give a row each: microseconds, GFLOP/s, GB/s.

    Args:
        names: operators to run, such as "attention"; all if empty.
        context: keys that attention looks at.
        seconds: spent on each.

    Raises:
        ValueError: there is no operator of that name.
    """
    cases = _operator_cases(config, dtype, context)
    for name in names:
        if name not in OPERATORS:
            raise ValueError(f"bench: there is no operator {name!r}: there are {OPERATORS}")
    rows = []
    for name, (shape, call, flop, moved) in cases.items():
        if names and name.partition(",")[0] not in names:
            continue
        progress(name)
        with torch.inference_mode():
            took = measure(call, seconds)
        rows.append(
            {
                "operator": name,
                "shape": shape,
                "us": took.min * 1e6,
                "us median": took.median * 1e6,
                "GFLOP/s": flop / took.min / 1e9,
                "GB/s": moved / took.min / 1e9,
            }
        )
    return rows
