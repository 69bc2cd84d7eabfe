"""The benchmarks run, and the runner says what it measured. No speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import gemma2
from benchmarks import runner
from gemma2 import bench

ROOT = Path(gemma2.__file__).parent.parent


@pytest.fixture
def nap(monkeypatch):
    """A benchmark in which the peer takes three times as long, and another one refuses."""

    def refuse():
        raise RuntimeError("no such shape")

    module = types.ModuleType("benchmarks.nap")
    module.cases = lambda: [{"ms": 1}, {"ms": 2}]
    module.run = lambda case: {
        "ours": lambda: time.sleep(case["ms"] * 1e-3),
        "peer": lambda: time.sleep(case["ms"] * 3e-3),
        "other": refuse,
        "flop": 1e6,
        "note": "asleep",
    }
    monkeypatch.setitem(sys.modules, "benchmarks.nap", module)


def test_the_runner_times_ours_and_the_peers_in_turns(nap, capsys):
    rows = runner.run_benchmark("nap", seconds=0.02)
    assert [row["ms"] for row in rows] == [1, 2]
    for row in rows:
        assert row["ours us"] >= row["ms"] * 1000
        assert row["ours us"] <= row["ours us median"]
        assert row["ours GFLOP/s"] == pytest.approx(1e6 / row["ours us"] / 1e3)
        assert row["x peer"] == pytest.approx(row["peer us"] / row["ours us"])
        assert row["peer us"] >= row["ms"] * 3000
        assert row["note"] == "asleep"
        assert row["other us"] is None
    assert "other: RuntimeError: no such shape" in capsys.readouterr().err
    assert len(runner.run_benchmark("nap", seconds=0.02, only="ms=2")) == 1


def test_a_failure_of_ours_is_not_passed_over(monkeypatch):
    def fail():
        raise RuntimeError("ours is broken")

    module = types.ModuleType("benchmarks.broken")
    module.cases = lambda: [{}]
    module.run = lambda case: {"ours": fail, "peer": lambda: None}
    monkeypatch.setitem(sys.modules, "benchmarks.broken", module)
    with pytest.raises(RuntimeError, match="ours is broken"):
        runner.run_benchmark("broken", seconds=0.01)


def test_tables_have_a_column_for_every_key():
    text = bench.markdown([{"a": 1.23456, "b": None}, {"a": 1234.5, "c": "x"}])
    head, _, first, second = text.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["a", "b", "c"]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["1.23", "-", "-"]
    assert [cell.strip() for cell in second.strip("|").split("|")] == ["1234", "-", "x"]


@pytest.mark.parametrize("name", [name for name in runner.available() if name != "model"])
def test_the_smallest_case_of_every_operator_runs(name):
    (row,) = runner.run_benchmark(name, seconds=0.001, limit=1)
    assert any(key.endswith(" us") and value is not None for key, value in row.items())


def test_an_unknown_benchmark_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as end:
        runner.main(["conv2d"])
    assert end.value.code == 2
    assert "there is no benchmark 'conv2d'" in capsys.readouterr().err


def test_the_model_is_measured_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "model.json"
    words = ["--layers", "1", "--prompt", "8", "--new", "3", "--runs", "1", "--isa", "portable"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.model", *words, "--alone", "--json", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert [row["variant"] for row in report["results"]] == ["ours", "ours, portable"]
    for row in report["results"]:
        assert row["prefill"] > 0
        assert row["decode"] > 0
        assert row["same tokens"] == "3 of 3"
        assert 0.01 < row["peak GB loading"] <= row["peak GB"] < 8
    assert report["machine"]["isa"]
    assert "| ours, portable |" in done.stdout
