"""Runs the benchmarks: `python -m benchmarks.runner attention linear`, all without a name.

A benchmark is a file `benchmarks/<name>.py` with two functions:

    def cases() -> list[dict]: what to run, from small to large; plain values, shown in the table.
    def run(case: dict, device: torch.device) -> dict: for one case, by name
        a function without arguments: it is timed; ours comes first, then the peers;
        a function that raises at once when called, or None: the peer cannot do this ("-");
        "flop", "bytes": per call, for GFLOP/s, GB/s and the share of a copy's speed;
        anything else: shown as it is.

No benchmark asserts a speed. Everything that is compared is timed in one run, in turns, since the
speed of a shared machine moves. Compiling is not timed. On a GPU inputs rotate (benchmarks/timing.py);
with --graph short calls are replays of a CUDA graph, which leaves out what Python costs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import GRAPH_BELOW, copy_rate, timer
from gemma2.bench import Timing, machine, markdown

__all__ = ["main", "run_benchmark"]

FOLDER = Path(__file__).parent
_CPU = torch.device("cpu")


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
) -> dict[str, Timing | None]:
    """Time all calls in turns, `rounds` times, so that a slow moment of the machine hits them all.

    A call that raises is given as None, with the reason on stderr. With `graph` calls are captured
    if ours is short; one that cannot be captured is timed with what Python costs, which is said.
    """
    found: dict[str, list[Timing]] = {name: [] for name in calls}
    timers: dict[str, Callable[[float], Timing]] = {}
    failed = set()
    ours = next(iter(calls), None)
    if graph and ours is not None:
        quick = timer(calls[ours], device)(min(0.02, seconds))
        graph = quick.median < GRAPH_BELOW
    for _ in range(rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                if name not in timers:
                    timers[name] = _timer(name, call, device, graph)
                found[name].append(timers[name](seconds / rounds))
            except Exception as error:  # a peer may refuse a shape; the others still count
                if name == ours:
                    raise
                print(f"  {name}: {first_line(error)}", file=sys.stderr)
                failed.add(name)
    return {
        name: None
        if name in failed
        else Timing(
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
) -> dict[str, Any]:
    """Give the case's row: its values, then for each call the time, its rate, and the speed-up."""
    torch.compiler.reset()  # each case compiles anew; many in one process reach dynamo's limit
    parts = module.run(case, device)
    calls = {name: part for name, part in parts.items() if callable(part) and name not in without}
    row: dict[str, Any] = dict(case)
    with torch.inference_mode():
        times = time_in_turns(calls, seconds, device=device, graph=graph)
    ours = next(iter(calls), None)
    for name, took in times.items():
        row[f"{name} us"] = None if took is None else took.min * 1e6
        row[f"{name} us median"] = None if took is None else took.median * 1e6
        for quantity, unit in (("flop", "GFLOP/s"), ("bytes", "GB/s")):
            if took is not None and parts.get(quantity):
                row[f"{name} {unit}"] = parts[quantity] / took.min / 1e9
        if name == ours and took is not None and parts.get("bytes") and copy:
            row["share of copy"] = parts["bytes"] / took.min / copy
        if name != ours and took is not None and times[ours] is not None:
            row[f"x {name}"] = took.min / times[ours].min
    row.update({n: p for n, p in parts.items() if not callable(p) and n not in ("flop", "bytes")})
    return row


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
    lines: Path | None = None,
    end: float = float("inf"),
    keep_going: bool = False,
) -> list[dict[str, Any]]:
    """Run `benchmarks/<name>.py`; print and give a row for each case that contains `only`.

    Args:
        seconds: spent on each call.
        limit: so many cases at most, the first ones.
        graph: short calls as replays of a CUDA graph.
        without: names of peers that are left out.
        copy: bytes per second of a copy, which ours is compared with.
        lines: a file to which a JSON line is appended for each case.
        end: time.monotonic() from which no further case is begun.
        keep_going: a case that fails is a row that says so, and the next one is run.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    rows = []
    out = _Lines(lines)
    for case in module.cases()[:limit]:
        shown = " ".join(f"{k}={v}" for k, v in case.items())
        if only not in shown:
            continue
        words = {"case": f"{name}: {shown}", "benchmark": name}
        if time.monotonic() >= end:
            out.add(**words, outcome="cut off", why="over the time budget")
            rows.append({**case, "trouble": "cut off: over the time budget"})
            continue
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            row = run_case(module, case, seconds, device, graph, without, copy)
        except Exception as error:
            # What a benchmark says it does not do on this device is no failure.
            outcome = "not run" if isinstance(error, NotImplementedError) else "failed"
            out.add(**words, outcome=outcome, why=first_line(error))
            if not keep_going:
                raise
            print(f"  {outcome}: {first_line(error)}", file=sys.stderr)
            rows.append({**case, "trouble": f"{outcome}: {first_line(error)}"})
            continue
        out.add(**words, outcome="passed", seconds=round(time.monotonic() - start, 2), row=row)
        rows.append(row)
    return rows


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
    parser.add_argument("--json", type=Path, help="write the results here, with the machine")
    parser.add_argument("--lines", type=Path, help="append a JSON line here after each case")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in available():
            parser.error(f"there is no benchmark {name!r}: there are {', '.join(available())}")
    cuda = args.device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.graph and not cuda:
        parser.error("--graph goes with --device cuda")
    if args.threads:
        torch.set_num_threads(args.threads)
    end = time.monotonic() + args.budget if args.budget is not None else float("inf")
    copy = copy_rate(args.device, min(1.0, args.seconds))
    # After the copy, so that a GPU's clocks are those of one at work.
    here = {**machine(args.device), "copy GB/s": round(copy / 1e9, 1)}
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
            copy=copy,
            lines=args.lines,
            end=end,
            keep_going=cuda,
        )
        print(f"\n## {name}\n\n{markdown(results[name])}", flush=True)
        if args.json:  # after each, so that a killed run leaves what it had
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"machine": here, "results": results}, indent=2) + "\n")
    troubles = [str(row.get("trouble", "")) for rows in results.values() for row in rows]
    return 1 if any(trouble.startswith("failed") for trouble in troubles) else 0


if __name__ == "__main__":
    sys.exit(main())
