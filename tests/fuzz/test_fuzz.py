"""The campaign sees broken readers, and a case is the same wherever and whenever it is drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import campaign, samples, worker
from tests.fuzz.readers import PLANTED, READERS, Case

ROOT = Path(__file__).resolve().parents[2]


def run_it(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: what is forked for the campaign is small and knows no pytest."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_planted_bug_is_reported(tmp_path: Path) -> None:
    names = list(PLANTED)
    done = run_it(
        *("--cases", str(len(names)), "--seed", "planted", "--readers", ",".join(names)),
        *("--processes", "2", "--cpu", "2", "--wall", "10", "--keep", str(tmp_path)),
    )
    assert done.returncode == 1, done.stderr
    seen = {}
    for file in tmp_path.glob("case-*.txt"):
        lines = file.read_text().splitlines()
        reader = next(line for line in lines if line.startswith("reader "))
        seen.setdefault(reader.removeprefix("reader planted "), set()).add(_kind(lines))
    assert seen["KeyError"] == {"raises KeyError"}
    assert seen["hang"] == {"HANG"}
    assert seen["wait"] == {"WAITS"}
    assert seen["memory"] == seen["memory of a tokenizer"] == {"too much memory"}
    assert seen["space"] == {"raises RuntimeError"}  # torch's, for an address space that is spent
    assert seen["crash"] == {"CRASH -11"}
    assert seen["nameless"] == {"names no file"}
    assert "WRONG" in seen["wrong"]
    assert "again: --seed planted --case" in done.stdout


def _kind(lines: list[str]) -> str:
    kinds = ("raises ", "HANG", "WAITS", "CRASH", "too ", "names no", "WRONG")
    return next(line for line in lines if line.startswith(kinds))


def test_a_case_is_drawn_again_from_its_number() -> None:
    readers = list(READERS)
    for number in range(3 * len(readers)):
        one, two = (worker.make("seed", number, readers) for _ in range(2))
        assert (one.reader, one.folder, one.said) == (two.reader, two.folder, two.said)
    assert worker.make("other", 5, readers).said != worker.make("seed", 5, readers).said


@pytest.mark.parametrize("name", READERS)
def test_a_healthy_folder_is_read(name: str, tmp_path: Path) -> None:
    for i, folder in enumerate(READERS[name].healthy()):
        samples.write(folder, tmp_path / str(i))
        READERS[name].read(tmp_path / str(i))


def test_a_letter_in_the_role_of_bos_is_no_wrong_tokenizer(tmp_path: Path) -> None:
    roles = {"bos_token": "a"}
    files = {**samples.tokenizer(), "tokenizer_config.json": json.dumps(roles).encode()}
    assert worker.run(Case("tokenizer", files, []), tmp_path / "case").kind == worker.READ


def test_what_the_tokenizers_library_takes_for_json_is_no_failure(tmp_path: Path) -> None:
    """Many small values in a decoder of a sequence, which it keeps several times."""
    files = samples.tokenizer()
    lists = b'"decoders":[' + b"[]," * 600_000
    content = bytes(files["tokenizer.json"]).replace(b'"decoders":[', lists)  # type: ignore[arg-type]
    case = Case("tokenizer", {**files, "tokenizer.json": content}, [])
    outcome = worker.run(case, tmp_path / "case")
    assert outcome.kind == worker.REFUSED, outcome
    assert outcome.memory > 10 * len(content)


def test_some_of_the_cases_of_a_campaign() -> None:
    """A first look, in seconds; `make fuzz` draws thousands."""
    result = campaign.Result()
    readers = list(READERS)
    for number in range(10 * len(readers)):
        case = worker.make("first look", number, readers)
        folder = ROOT / "build" / "fuzz-first" / "case"
        result.add(case.reader, number, worker.run(case, folder))
    assert not result.failures, result.failures
    for reader, counts in result.counts.items():
        assert counts[worker.READ], reader
        assert counts[worker.REFUSED], reader
