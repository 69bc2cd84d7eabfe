"""Many cases in a few processes that are watched: one that crashes, hangs or waits is replaced."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz import samples, worker
from tests.fuzz.readers import READERS, Case
from tests.fuzz.worker import Outcome


@dataclass(frozen=True)
class Limits:
    """A process may take this long with one case before it is killed: processor time, and time on
    the wall for one that only waits."""

    cpu: float = 10.0
    wall: float = 60.0


# Where a process is forked, it has all modules at once.
_FORK = multiprocessing.get_context("fork")
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Result:
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # reader -> kind -> cases
    failures: list[tuple[int, Outcome]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)

    def add(self, reader: str, number: int, outcome: Outcome) -> None:
        self.counts.setdefault(reader, Counter())[outcome.kind] += 1
        self.slowest = max(self.slowest, (outcome.seconds, number))
        self.largest = max(self.largest, (outcome.memory, number))
        if outcome.failed:
            self.failures.append((number, outcome))

    def table(self) -> str:
        kinds = sorted(set().union(*self.counts.values()) - {worker.READ, worker.REFUSED})
        columns = ["cases", worker.READ, worker.REFUSED, *kinds]
        wide = max(map(len, self.counts), default=0) + 2
        lines = [" " * wide + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in columns)]
        total: Counter[str] = Counter()
        for reader, counts in self.counts.items():
            total += counts
            lines.append(_line(reader, counts, columns, wide))
        return "\n".join([*lines, _line("all", total, columns, wide)])


def _line(name: str, counts: Counter[str], columns: list[str], wide: int) -> str:
    values = [counts.total(), *(counts[column] for column in columns[1:])]
    cells = (f"{value:>{max(10, len(c) + 2)}}" for c, value in zip(columns, values, strict=True))
    return f"{name:<{wide}}" + "".join(cells)


def _work(
    seed: str, readers: list[str], numbers: range, place: Path, answers: Connection, log: Path
) -> None:
    with log.open("ab", buffering=0) as file:  # what libraries print before they die
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(place.parent)
    for name in readers:  # what is imported late is not of a case's making
        if name in READERS:
            worker.run(Case(name, READERS[name].healthy()[0], []), place)
    worker.make(seed, numbers[0], readers)
    answers.send(None)  # the first case begins
    for number in numbers:
        answers.send((number, worker.run(worker.make(seed, number, readers), place)))


class _Process:
    def __init__(self, seed: str, readers: list[str], numbers: range, place: Path) -> None:
        self.numbers, self.log = numbers, place.with_suffix(".log")
        self.done = 0
        self.is_ready = False  # before its first case
        self.ended = False  # before it was through
        self.answers, end = _FORK.Pipe(duplex=False)
        self.log.write_bytes(b"")
        arguments = (seed, readers, numbers, place, end, self.log)
        self.process = _FORK.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        end.close()
        self.begin()

    def begin(self) -> None:
        self.since, self.cpu = time.monotonic(), self._cpu()

    def _cpu(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICK

    @property
    def number(self) -> int:
        """The case that is at work."""
        return self.numbers[self.done]

    def overdue(self, limits: Limits) -> str | None:
        if self.is_ready and self._cpu() - self.cpu > limits.cpu:
            return "HANG"
        return "WAITS" if time.monotonic() - self.since > limits.wall else None

    def end(self) -> str:
        self.process.kill()
        self.process.join()
        self.answers.close()
        return self.log.read_text(errors="replace")[-3000:]


def run(
    seed: str,
    numbers: range,
    readers: list[str],
    processes: int,
    keep: Path | None = None,
    limits: Limits = Limits(),
) -> Iterator[tuple[int, Outcome]]:
    """Run the cases `numbers`; give each with its outcome. Failing ones are written to `keep`."""
    scratch = Path(tempfile.mkdtemp(prefix="gemma2-fuzz-"))

    def start(i: int, left: range) -> _Process | None:
        return _Process(seed, readers, left, scratch / f"w{i}" / "case") if left else None

    for i in range(processes):
        (scratch / f"w{i}").mkdir()
    try:
        at_work = [start(i, numbers[i::processes]) for i in range(processes)]
        while any(at_work):
            wait([p.answers for p in at_work if p], timeout=0.5)
            for i, process in enumerate(at_work):
                if process is None:
                    continue
                for number, outcome in _answers(process):
                    if outcome.failed and keep is not None:
                        _keep(seed, number, readers, outcome, keep)
                    yield number, outcome
                if process.done == len(process.numbers):
                    process.end()
                    at_work[i] = None
                    continue
                kind = process.overdue(limits)
                if process.ended:
                    process.process.join()
                    kind = f"CRASH {process.process.exitcode}"
                if kind is not None:
                    number = process.number
                    outcome = Outcome(kind, process.end())
                    if keep is not None:
                        _keep(seed, number, readers, outcome, keep)
                    yield number, outcome
                    at_work[i] = start(i, process.numbers[process.done + 1 :])
    finally:
        for process in filter(None, at_work):
            process.end()
        shutil.rmtree(scratch, ignore_errors=True)


def _answers(process: _Process) -> Iterator[tuple[int, Outcome]]:
    try:
        while process.answers.poll():
            answer: Any = process.answers.recv()
            process.is_ready = True
            process.begin()
            if answer is not None:
                process.done += 1
                yield answer
    except (EOFError, OSError):
        process.ended = True


def _keep(seed: str, number: int, readers: list[str], outcome: Outcome, place: Path) -> None:
    """Write a failing case's folder, and beside it what it is and what came of it."""
    case = worker.make(seed, number, readers)
    target = place / f"case-{number}"
    samples.remove(target)
    samples.write(case.folder, target)
    said = "\n".join(
        ["seed " + seed, "reader " + case.reader, *case.said, outcome.kind, outcome.text]
    )
    target.with_suffix(".txt").write_text(said + "\n", errors="backslashreplace")
