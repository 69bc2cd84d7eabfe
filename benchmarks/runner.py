"""Runs the benchmarks: `python -m benchmarks.runner attention linear`, all without a name.

A benchmark is a file `benchmarks/<name>.py` with two functions, and two more if a GPU gets others:

    def cases() -> list[dict]: what to run, from small to large; plain values, shown in the table.
    def run(case: dict, device: torch.device) -> dict: for one case, by name
        a function without arguments: it is timed; ours comes first, then the peers;
        a Timing: the same, timed by the benchmark itself; an exception: why it is not timed ("-");
        "check": a Check (benchmarks/check.py), and "checked": which of the functions it is for;
        "flop", "bytes", "tokens": per call, for GFLOP/s, GB/s, the shares of a product's and a copy's
            speed, and tokens/s;
        anything else: shown as it is.
    def cuda_cases() -> list[dict]: in place of cases(), what counts most first.
    def tiny(case: dict) -> dict: a GPU's case at a size for any CPU.

No benchmark asserts a speed. Everything that is compared is timed in one run, in turns, since the
speed of a shared machine moves. A wrong result is not timed: of a peer it gives "-", of ours a failed
case. Compiling is not timed. On a GPU inputs rotate (benchmarks/timing.py); with --graph short calls
are replays of a CUDA graph, which leaves out what Python costs. --rehearse runs a GPU's cases, made
tiny, on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.check import Check
from benchmarks.timing import GRAPH_BELOW, copy_rate, product_rate, time_limit, timer
from gemma2.bench import Timing, machine, markdown

__all__ = ["main", "run_benchmark"]

FOLDER = Path(__file__).parent
_CPU = torch.device("cpu")
# Ours in its variants: if one of them fails, the case has failed. Whatever else is timed is a peer.
OURS = ("ours", "deterministic", "kernel")
# Of a time budget: what a case needs for ours and for peers that need not be compiled. In what is not
# needed so for the cases to come, peers of the present case may get ready.
CASE_SECONDS = 1.5
REHEARSED = "NVIDIA H100 80GB HBM3"  # the GPU that a rehearsal asks predictions for


def available() -> list[str]:
    """Give the names of all files here that have `cases` and `run`."""
    return sorted(
        path.stem
        for path in FOLDER.glob("*.py")
        if path.stem != "accuracy"  # it measures errors, not time
        and all(re.search(rf"^def {name}\(", path.read_text(), re.M) for name in ("cases", "run"))
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def time_in_turns(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    rounds: int = 3,
    device: torch.device = _CPU,
    graph: bool = False,
    prepare: Callable[[str], object] = lambda name: None,
    end: float = math.inf,
) -> dict[str, Timing | str]:
    """Time all calls in turns, `rounds` times, so that a slow moment of the machine hits them all.

    A peer that raises is given as the reason why. With `graph` calls are captured if ours is short;
    one that cannot be captured is timed with what Python costs, which is said.

    Args:
        prepare: is given each name before its call is timed, and calls it for the first time.
        end: time.monotonic() until which peers may get ready; each has CASE_SECONDS in any case.
    """
    found: dict[str, list[Timing]] = {name: [] for name in calls}
    timers: dict[str, Callable[[float], Timing]] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                if name not in timers:
                    least = time.monotonic() + CASE_SECONDS
                    with time_limit(math.inf if name in OURS else max(end, least)):
                        prepare(name)
                        if name == next(iter(calls)) and graph:
                            quick = timer(call, device)(min(0.02, seconds))
                            graph = quick.median < GRAPH_BELOW
                        timers[name] = _timer(name, call, device, graph)
                found[name].append(timers[name](seconds / rounds))
            except Exception as error:  # a peer may refuse a shape; the others still count
                if name in OURS:
                    raise
                print(f"  {name}: {first_line(error)}", file=sys.stderr)
                failed[name] = first_line(error)
    return {
        name: failed.get(name)
        or Timing(
            min(t.min for t in times),
            sorted(t.median for t in times)[len(times) // 2],
            sum(t.runs for t in times),
        )
        for name, times in found.items()
    }


def _timer(
    name: str, call: Callable[[], object], device: torch.device, graph: bool
) -> Callable[[float], Timing]:
    if graph:
        call()  # whatever is wrong with the call itself is not the graph's fault
        try:
            return timer(call, device, graph=True)
        except Exception as error:
            print(f"  {name}: no graph: {first_line(error)}", file=sys.stderr)
    return timer(call, device)


def run_case(
    module: Any,
    case: dict[str, Any],
    seconds: float,
    device: torch.device = _CPU,
    graph: bool = False,
    without: Collection[str] = (),
    copy: float | None = None,
    product: float | None = None,
    end: float = math.inf,
) -> dict[str, Any]:
    """Give the case's row: its values, then for each call the time, its rate, and the speed-up."""
    torch.compiler.reset()  # each case compiles anew; many in one process reach dynamo's limit
    parts = module.run(case, device)
    check: Check | None = parts.pop("check", None)
    checked = parts.pop("checked", ())
    calls = {name: part for name, part in parts.items() if callable(part) and name not in without}
    row: dict[str, Any] = dict(case)
    errors: dict[str, float] = {}

    def prepare(name: str) -> None:
        if check is None or name not in checked:
            calls[name]()  # compiles
            return
        try:
            errors[name] = check(calls[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None

    times: dict[str, Timing | str] = {}
    if calls:
        with torch.inference_mode():
            times = time_in_turns(calls, seconds, 3, device, graph, prepare, end)
    for name, part in parts.items():
        if isinstance(part, Timing | Exception) and name not in without:
            times[name] = part if isinstance(part, Timing) else first_line(part)
    flop, moved, tokens = (parts.pop(name, None) for name in ("flop", "bytes", "tokens"))
    ours = next(iter(times.values()), None)
    for name, took in times.items():
        if isinstance(took, str):
            row[f"{name} us"] = None
            continue
        row[f"{name} us"] = took.min * 1e6
        row[f"{name} us median"] = took.median * 1e6
        for amount, unit, size in (
            (flop, "GFLOP/s", 1e9),
            (moved, "GB/s", 1e9),
            (tokens, "tokens/s", 1),
        ):
            if amount:
                row[f"{name} {unit}"] = amount / took.min / size
        if took is ours:
            for amount, limit, what in ((moved, copy, "copy"), (flop, product, "product")):
                if amount and limit:
                    row[f"share of {what}"] = amount / took.min / limit
        elif isinstance(ours, Timing):
            row[f"x {name}"] = took.min / ours.min
    row.update({f"{name} error": error for name, error in errors.items()})
    row.update({name: part for name, part in parts.items() if name not in row and _is_plain(part)})
    troubles = [f"{name}: {why}" for name, why in times.items() if isinstance(why, str)]
    if troubles:
        row["not timed"] = "; ".join(troubles)
    return row


def _is_plain(part: object) -> bool:
    return not callable(part) and not isinstance(part, Timing | Exception)


def add_prediction(row: dict[str, Any], name: str, case: dict[str, Any], gpu: str | None) -> None:
    """Put what the kernel's plan predicts beside what was measured, if it predicts this case.

    gpu: None in a rehearsal, in which what was measured is not to be compared.
    """
    from benchmarks.predict import predict

    predicted = predict(name, case, gpu or REHEARSED)
    if predicted is None:
        return
    row["predicted us"] = predicted["seconds"] * 1e6
    row["predicted range us"] = " to ".join(f"{predicted[n] * 1e6:.3g}" for n in ("low", "high"))
    row["bound"] = predicted["bound"]
    if gpu and row.get("ours us"):
        row["measured / predicted"] = row["ours us"] / row["predicted us"]


class _Lines:
    """A file of JSON lines, one a case, each written at once: a killed run leaves what it had."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, **line: Any) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"part": "bench", **line}) + "\n")


def words_of(case: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in case.items())


def chosen_cases(
    module: Any, device: torch.device, only: str = "", rehearse: bool = False
) -> list[dict[str, Any]]:
    """Give the device's cases whose text contains `only`; for a rehearsal a GPU's, made tiny."""
    gpu = rehearse or device.type == "cuda"
    every = module.cuda_cases() if gpu and hasattr(module, "cuda_cases") else module.cases()
    chosen = [case for case in every if only in words_of(case)]
    if rehearse and hasattr(module, "tiny"):
        chosen = list({words_of(case): case for case in map(module.tiny, chosen)}.values())
    return chosen


def run_benchmark(
    name: str,
    seconds: float = 1.0,
    only: str = "",
    limit: int | None = None,
    device: torch.device = _CPU,
    *,
    graph: bool = False,
    without: Collection[str] = (),
    copy: float | None = None,
    product: float | None = None,
    lines: Path | None = None,
    end: float = math.inf,
    rehearse: bool = False,
) -> list[dict[str, Any]]:
    """Run `benchmarks/<name>.py`; print and give a row for each case that contains `only`.

    On a GPU, and in a rehearsal for it, a case that fails is a row that says so, and the next one is
    run; on the CPU its error is raised.

    Args:
        seconds: spent on each call.
        limit: so many cases at most, the first ones.
        graph: short calls as replays of a CUDA graph.
        without: names of peers that are left out.
        copy: bytes per second of a copy, which ours is compared with.
        product: FLOP per second of a product, which ours is compared with.
        lines: a file to which a JSON line is appended for each case.
        end: time.monotonic() from which no further case is begun.
        rehearse: a GPU's cases, made tiny.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    cuda = device.type == "cuda"
    rows = []
    out = _Lines(lines)
    lost = ""  # why nothing runs on the device any more
    cases = chosen_cases(module, device, only, rehearse)[:limit]
    for number, case in enumerate(cases):
        shown = words_of(case)
        words = {"case": f"{name}: {shown}", "benchmark": name}
        start = time.monotonic()
        if start >= end or lost:
            outcome, why = ("not run", lost) if lost else ("cut off", "over the time budget")
            out.add(**words, outcome=outcome, why=why)
            rows.append({**case, "trouble": f"{outcome}: {why}"})
            continue
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        ready = end - CASE_SECONDS * (len(cases) - number)
        try:
            row = run_case(module, case, seconds, device, graph, without, copy, product, ready)
            if cuda or rehearse:
                gpu = torch.cuda.get_device_name(device) if cuda else None
                add_prediction(row, name, case, gpu)
        except Exception as error:
            why = first_line(error)
            out.add(**words, outcome="failed", why=why)
            if not cuda and not rehearse:
                raise
            print(f"  failed: {why}", file=sys.stderr)
            rows.append({**case, "trouble": f"failed: {why}"})
        else:
            took = round(time.monotonic() - start, 2)
            out.add(**words, outcome="passed", seconds=took, row=row)
            rows.append(row)
        if cuda:
            lost = _make_room(device)
    return rows


def _make_room(device: torch.device) -> str:
    """Give back what a case has left on the GPU; give why nothing runs there, if so."""
    gc.collect()
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"after a fault nothing runs on the device in its process: {first_line(error)}"
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runner", description="Runs benchmarks and prints tables."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(available())}")
    parser.add_argument("--device", type=torch.device, default=_CPU, help="cpu (default) or cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each call (1)")
    parser.add_argument("--only", default="", help="cases whose text contains this")
    parser.add_argument("--limit", type=int, help="so many cases at most, the first ones")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--without", nargs="*", default=[], metavar="PEER", help="peers left out")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs for short calls")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument("--rehearse", action="store_true", help="a GPU's cases, tiny, on the CPU")
    parser.add_argument("--json", type=Path, help="write the results here, with the machine")
    parser.add_argument("--lines", type=Path, help="append a JSON line here after each case")
    args = parser.parse_args(argv)
    started = time.monotonic()
    for name in args.names:
        if name not in available():
            parser.error(f"there is no benchmark {name!r}: there are {', '.join(available())}")
    cuda = args.device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.graph and not cuda:
        parser.error("--graph goes with --device cuda")
    if args.rehearse and cuda:
        parser.error("--rehearse is for a machine without a GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    end = started + args.budget if args.budget is not None else math.inf
    rates = {"copy": copy_rate(args.device, min(1.0, args.seconds))}
    if cuda:
        rates["product"] = product_rate(args.device, min(1.0, args.seconds))
    elif args.rehearse:
        rates["product"] = product_rate(args.device, 0.0, size=256)
    # After the copy, so that a GPU's clocks are those of one at work.
    here = {**machine(args.device), "copy GB/s": round(rates["copy"] / 1e9, 1)}
    if "product" in rates:
        here["product TFLOP/s"] = round(rates["product"] / 1e12, 3)
    results = {}
    print(", ".join(f"{k}: {v}" for k, v in here.items()))
    _Lines(args.lines).add(case="machine", outcome="passed", machine=here)
    for name in args.names or available():
        results[name] = run_benchmark(
            name,
            args.seconds,
            args.only,
            args.limit,
            args.device,
            graph=args.graph,
            without=args.without,
            lines=args.lines,
            end=end,
            rehearse=args.rehearse,
            **rates,
        )
        print(f"\n## {name}\n\n{markdown(results[name])}", flush=True)
        if args.json:  # after each, so that a killed run leaves what it had
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"machine": here, "results": results}, indent=2) + "\n")
    troubles = [str(row.get("trouble", "")) for rows in results.values() for row in rows]
    return 1 if any(trouble.startswith("failed") for trouble in troubles) else 0


if __name__ == "__main__":
    sys.exit(main())
