"""Runs the benchmarks: `python -m benchmarks.runner attention linear`, all without a name.

A benchmark is a file `benchmarks/<name>.py` with two functions:

    def cases() -> list[dict]: what to run, from small to large; plain values, shown in the table.
    def run(case: dict) -> dict: for one case, by name
        a function without arguments: it is timed; ours comes first, then the peers;
        a function that raises at once when called, or None: the peer cannot do this ("-");
        "flop", "bytes": per call, for GFLOP/s and GB/s;
        anything else: shown as it is.

No benchmark asserts a speed. Everything that is compared is timed in one run, in turns, since the
speed of a shared machine moves.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gemma2.bench import Timing, machine, markdown, measure

__all__ = ["main", "run_benchmark"]

FOLDER = Path(__file__).parent
_NOT_BENCHMARKS = {"__init__", "runner", "accuracy"}  # accuracy measures errors, not time


def available() -> list[str]:
    """Give the names of all files here that have `cases` and `run`."""
    return sorted(
        path.stem
        for path in FOLDER.glob("*.py")
        if path.stem not in _NOT_BENCHMARKS
        and all(re.search(rf"^def {name}\(", path.read_text(), re.M) for name in ("cases", "run"))
    )


def time_in_turns(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: int = 3
) -> dict[str, Timing | None]:
    """Time all calls in turns, `rounds` times, so that a slow moment of the machine hits them all.

    A call that raises is given as None, with the reason on stderr.
    """
    found: dict[str, list[Timing]] = {name: [] for name in calls}
    failed = set()
    for _ in range(rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                found[name].append(measure(call, seconds / rounds, least=3, warm_up=1))
            except Exception as error:  # a peer may refuse a shape; the others still count
                if name == next(iter(calls)):
                    raise
                print(f"  {name}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
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


def run_case(module: Any, case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Give the case's row: its values, then for each call the time, its rate, and the speed-up."""
    parts = module.run(case)
    calls = {name: part for name, part in parts.items() if callable(part)}
    row: dict[str, Any] = dict(case)
    with torch.inference_mode():
        times = time_in_turns(calls, seconds)
    ours = next(iter(calls), None)
    for name, took in times.items():
        row[f"{name} us"] = None if took is None else took.min * 1e6
        row[f"{name} us median"] = None if took is None else took.median * 1e6
        for quantity, unit in (("flop", "GFLOP/s"), ("bytes", "GB/s")):
            if took is not None and parts.get(quantity):
                row[f"{name} {unit}"] = parts[quantity] / took.min / 1e9
        if name != ours and took is not None and times[ours] is not None:
            row[f"x {name}"] = took.min / times[ours].min
    row.update({n: p for n, p in parts.items() if not callable(p) and n not in ("flop", "bytes")})
    return row


def run_benchmark(
    name: str, seconds: float = 1.0, only: str = "", limit: int | None = None
) -> list[dict[str, Any]]:
    """Run `benchmarks/<name>.py`; print and give a row for each case that contains `only`."""
    module = importlib.import_module(f"benchmarks.{name}")
    rows = []
    for case in module.cases()[:limit]:
        shown = " ".join(f"{k}={v}" for k, v in case.items())
        if only not in shown:
            continue
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        rows.append(run_case(module, case, seconds))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runner", description="Runs benchmarks and prints tables."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(available())}")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each call (1)")
    parser.add_argument("--only", default="", help="cases whose text contains this")
    parser.add_argument("--limit", type=int, help="so many cases at most, the first ones")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="write the results here, with the machine")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in available():
            parser.error(f"there is no benchmark {name!r}: there are {', '.join(available())}")
    if args.threads:
        torch.set_num_threads(args.threads)
    here = machine()
    results = {}
    print(", ".join(f"{k}: {v}" for k, v in here.items()))
    for name in args.names or available():
        results[name] = run_benchmark(name, args.seconds, args.only, args.limit)
        print(f"\n## {name}\n\n{markdown(results[name])}", flush=True)
        if args.json:  # after each, so that a killed run leaves what it had
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"machine": here, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
