"""The benchmarks run, and the runner says what it measured. No speed is asserted."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import gemma2
from benchmarks import runner, timing
from gemma2 import bench

ROOT = Path(gemma2.__file__).parent.parent


@pytest.fixture
def nap(monkeypatch):
    """A benchmark in which the peer takes three times as long, and another one refuses."""

    def refuse():
        raise RuntimeError("no such shape")

    module = types.ModuleType("benchmarks.nap")
    module.cases = lambda: [{"ms": 1}, {"ms": 2}]
    module.run = lambda case, device: {
        "ours": lambda: time.sleep(case["ms"] * 1e-3),
        "peer": lambda: time.sleep(case["ms"] * 3e-3),
        "other": refuse,
        "flop": 1e6,
        "bytes": 1e6,
        "note": "asleep",
    }
    monkeypatch.setitem(sys.modules, "benchmarks.nap", module)


def test_the_runner_times_ours_and_the_peers_in_turns(nap, capsys):
    rows = runner.run_benchmark("nap", seconds=0.02, copy=4e9)
    assert [row["ms"] for row in rows] == [1, 2]
    for row in rows:
        assert row["ours us"] >= row["ms"] * 1000
        assert row["ours us"] <= row["ours us median"]
        assert row["ours GFLOP/s"] == pytest.approx(1e6 / row["ours us"] / 1e3)
        assert row["share of copy"] == pytest.approx(row["ours GB/s"] / 4)
        assert row["x peer"] == pytest.approx(row["peer us"] / row["ours us"])
        assert row["peer us"] >= row["ms"] * 3000
        assert row["note"] == "asleep"
        assert row["other us"] is None
        assert row["not timed"] == "other: RuntimeError: no such shape"
    assert "other: RuntimeError: no such shape" in capsys.readouterr().err
    (row,) = runner.run_benchmark("nap", seconds=0.02, only="ms=2", without=["peer"])
    assert "peer us" not in row
    assert "share of copy" not in row  # no copy was measured


def broken(monkeypatch, error):
    """A benchmark of which the second of three cases fails."""

    def ours(case):
        if case["n"] == 2:
            raise error

    module = types.ModuleType("benchmarks.broken")
    module.cases = lambda: [{"n": 1}, {"n": 2}, {"n": 3}]
    module.run = lambda case, device: {"ours": lambda: ours(case), "peer": lambda: None}
    monkeypatch.setitem(sys.modules, "benchmarks.broken", module)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_failure_of_ours_is_not_passed_over(monkeypatch, tmp_path):
    broken(monkeypatch, RuntimeError("ours is broken"))
    with pytest.raises(RuntimeError, match="ours is broken"):
        runner.run_benchmark("broken", seconds=0.01, lines=tmp_path / "lines")
    first, second = lines_of(tmp_path / "lines")
    assert (first["case"], first["outcome"]) == ("broken: n=1", "passed")
    assert first["row"]["ours us"] > 0
    assert (second["outcome"], second["why"]) == ("failed", "RuntimeError: ours is broken")


def test_on_a_gpu_a_failure_is_a_row_and_the_next_case_is_run(monkeypatch, tmp_path):
    broken(monkeypatch, RuntimeError("ours is broken"))
    rows = runner.run_benchmark("broken", 0.01, lines=tmp_path / "lines", rehearse=True)
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert rows[1]["trouble"] == "failed: RuntimeError: ours is broken"
    outcomes = [line["outcome"] for line in lines_of(tmp_path / "lines")]
    assert outcomes == ["passed", "failed", "passed"]


def test_over_the_time_budget_no_case_is_begun(nap, tmp_path):
    rows = runner.run_benchmark("nap", 0.01, lines=tmp_path / "lines", end=time.monotonic())
    assert [row["trouble"] for row in rows] == ["cut off: over the time budget"] * 2
    assert [line["outcome"] for line in lines_of(tmp_path / "lines")] == ["cut off"] * 2


# ---- how it is timed ----------------------------------------------------------------------------


def test_short_calls_are_timed_in_batches_that_fill_the_time_of_a_clock_reading():
    asked = []

    def batch(n):
        """A device whose clock shows 10 us a call."""
        asked.append(n)
        return n * 1e-5

    took = bench._measure(batch, seconds=0.0, least=4, batch_seconds=5e-4)
    assert asked == [1, 50, 50, 50, 50]
    assert took.min == took.median == pytest.approx(1e-5)
    assert took.runs == 200

    asked.clear()
    bench._measure(batch, seconds=0.0, least=3, batch_seconds=0.0)
    assert asked == [1, 1, 1]


def test_minimum_and_median_are_those_of_the_batches():
    durations = iter([0.5, 3.0, 1.0, 2.0, 9.0, 4.0])
    took = bench._measure(lambda n: next(durations), seconds=0.0, least=6, batch_seconds=0.0)
    assert (took.min, took.median, took.runs) == (0.5, 2.5, 6)


def test_inputs_take_turns_and_a_round_of_results_is_kept():
    numbers = iter(range(9))
    inputs = timing.Inputs(lambda: (next(numbers),), 10, torch.device("cpu"), cold=25)
    call = inputs.call(lambda number: 10 * number)
    assert call.round == 3  # three sets of 10 bytes fill 25
    assert [call() for _ in range(5)] == [0, 10, 20, 0, 10]
    assert list(call._kept) == [20, 0, 10]
    call.forget()
    assert not call._kept


def test_a_large_input_comes_once_and_there_are_limits_to_the_sets(monkeypatch):
    cpu = torch.device("cpu")
    assert len(timing.Inputs(tuple, 1000, cpu).sets) == 1
    assert len(timing.Inputs(tuple, 1000, cpu, cold=1000).sets) == 1
    assert len(timing.Inputs(tuple, 1, cpu, cold=1 << 30).sets) == timing.MOST_SETS
    monkeypatch.setattr(timing, "MOST_BYTES", 3000)

    def views():
        return torch.zeros(2, 100).unbind()  # 800 bytes that two tensors share

    assert len(timing.Inputs(views, 1, cpu, cold=1 << 30).sets) == 3


def test_the_product_counts_two_operations_a_term_and_takes_the_median(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *_, **__: bench.Timing(2.0, 4.0, 5))
    assert timing.product_rate(torch.device("cpu"), size=10) == 2000 / 4.0


def test_inputs_are_the_same_in_every_run():
    one, two = (timing.Draw(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(one.normal(3, 4), two.normal(3, 4))
    assert torch.equal(one.integers(100, 50), two.integers(100, 50))


def test_the_copy_counts_what_is_read_and_what_is_written(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *_, **__: bench.Timing(2.0, 3.0, 5))
    assert timing.copy_rate(torch.device("cpu"), size=1000) == 1000.0
    assert timing.last_level_cache() >= 1 << 20


def test_a_compiled_peer_without_a_compiler_is_a_dash_with_the_reason(tmp_path):
    file = tmp_path / "softcap.json"
    words = ["softcap", "--limit", "1", "--seconds", "0.01", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.runner", *words],
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    (row,) = report["results"]["softcap"]
    assert row["ours us"] > 0
    assert row["compile us"] is None
    assert re.search(r"^  compile: .*[Cc]ompiler", done.stderr, re.M)
    assert report["machine"]["copy GB/s"] > 0
    assert row["share of copy"] == pytest.approx(
        row["ours GB/s"] / report["machine"]["copy GB/s"], rel=0.02
    )


def test_compiling_is_not_in_the_time():
    module = importlib.import_module("benchmarks.softcap")
    row = runner.run_case(module, {"rows": 1, "vocab": 1000, "dtype": "float32"}, seconds=0.01)
    assert row["compile us median"] < 1e5  # compiling takes seconds


def test_tables_have_a_column_for_every_key():
    text = bench.markdown([{"a": 1.23456, "b": None}, {"a": 1234.5, "c": "x"}])
    head, _, first, second = text.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["a", "b", "c"]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["1.23", "-", "-"]
    assert [cell.strip() for cell in second.strip("|").split("|")] == ["1234", "-", "x"]


@pytest.mark.parametrize("name", [name for name in runner.available() if name != "model"])
def test_the_smallest_case_of_every_operator_runs(name):
    (row,) = runner.run_benchmark(name, seconds=0.001, limit=1, without=["compile"])
    times = {key: value for key, value in row.items() if key.endswith(" us")}
    assert len(times) > 1
    assert all(value is not None for value in times.values())


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
