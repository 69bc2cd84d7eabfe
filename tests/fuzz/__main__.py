"""Damaged model folders by the thousand; see tests/fuzz/__init__.py.

python -m tests.fuzz --cases 10000             what CI runs, seeded by the commit
python -m tests.fuzz --seed 1a2b3c --case 77   one case again, told in full
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz import campaign, worker
from tests.fuzz.readers import PLANTED, READERS

ROOT = Path(__file__).resolve().parents[2]
_SHOWN = 10  # failures that are printed in full


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()[:12] or "0"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", default=None, help="any text (the commit)")
    parser.add_argument("--case", type=int, default=None, help="run this one alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--readers", default=",".join(READERS), help=f"some of {', '.join([*READERS, *PLANTED])}"
    )
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "build" / "fuzz", help="failing folders"
    )
    limits = campaign.Limits()
    parser.add_argument("--cpu", type=float, default=limits.cpu, help="seconds a case may compute")
    parser.add_argument("--wall", type=float, default=limits.wall, help="seconds it may wait")
    given = parser.parse_args()
    readers = [name.strip() for name in given.readers.split(",")]
    unknown = [name for name in readers if name not in {**READERS, **PLANTED}]
    if unknown:
        parser.error(f"--readers names {unknown[0]!r}: it must be some of {list(READERS)}")
    seed = _commit() if given.seed is None else given.seed
    numbers = range(given.first, given.first + given.cases)
    if given.case is not None:
        numbers = range(given.case, given.case + 1)
        case = worker.make(seed, given.case, readers)
        print(f"reader {case.reader}", *case.said, sep="\n")
    print(f"{len(numbers)} cases, seed {seed}", flush=True)
    given.keep.mkdir(parents=True, exist_ok=True)
    result, start = campaign.Result(), time.monotonic()
    limits = campaign.Limits(given.cpu, given.wall)
    for number, outcome in campaign.run(
        seed, numbers, readers, given.processes, given.keep, limits
    ):
        result.add(readers[number % len(readers)], number, outcome)
        if outcome.failed and len(result.failures) <= _SHOWN:
            again = f"--seed {seed} --case {number}"
            if given.readers != parser.get_default("readers"):
                again += f" --readers '{given.readers}'"
            print(f"\ncase {number}: {outcome.kind}\n{outcome.text}\nagain: {again}", flush=True)
        elif given.case is not None:
            print(f"{outcome.kind}: {outcome.text}")
    took = time.monotonic() - start
    print(f"\n{result.table()}\n")
    print(f"{len(result.failures)} failures in {len(numbers)} cases, {took:.0f} s, seed {seed}")
    print(f"slowest: case {result.slowest[1]}, {result.slowest[0]:.2f} s")
    print(f"most memory: case {result.largest[1]}, {result.largest[0] / 2**20:.0f} MiB")
    if result.failures:
        print(f"the folders of failing cases are in {given.keep}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
