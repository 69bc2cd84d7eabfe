"""The GPU day's command, where there is no GPU: its dry run, its files, and what the proxy copies."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gemma2
from benchmarks import gpu_plan
from gemma2 import ops, reference
from tests.cuda import gpu_day, lines, proxy

ROOT = Path(gemma2.__file__).parent.parent
CPU = torch.device("cpu")


def command(out, *words):
    return [
        *(sys.executable, "-m", "tests.cuda.gpu_day", "--dry-run", "--build", "none"),
        *("--out", str(out), *words),
    ]


def run(out, *words):
    """Gives the finished process and the lines it left."""
    done = subprocess.run(
        command(out, *words),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, lines.read(out / "results.jsonl")


def outcomes(found):
    return {line["case"]: line["outcome"] for line in found}


# ---- the command --------------------------------------------------------------------------------


def test_a_dry_run_of_the_tests_ends_well_and_leaves_lines_and_tables(tmp_path):
    done, found = run(tmp_path, "--part", "tests", "--only", "softcap")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all({"part", "case", "outcome"} <= line.keys() for line in found)
    assert found[0]["case"] == "start"
    assert found[0]["machine"]["torch"] == torch.__version__
    assert found[-1]["case"] == "end"
    said = outcomes(found)
    assert said["build"] == "not run"
    assert said["file tests/ops/test_softcap.py"] == "passed"
    tests = [line for line in found if "::test_" in line["case"]]
    assert len(tests) > 10
    assert {line["outcome"] for line in tests} == {"passed"}
    (operator,) = (line for line in found if line["case"] == "operator softcap")
    assert operator["calls"] > 50
    assert operator["differing"] == 0
    tables = (tmp_path / "results.md").read_text()
    assert f"| tests/ops/test_softcap.py | {len(tests)} |" in tables
    assert f"| operator softcap | {operator['calls']} | 0 | passed |" in tables
    assert tables.strip() in done.stdout
    assert " passed" in (tmp_path / "log.txt").read_text()


def test_sanitizers_that_cannot_run_are_recorded_with_the_reason(tmp_path):
    done, found = run(tmp_path, "--part", "sanitize", "--only", "rms_norm")
    assert done.returncode == 0, done.stdout + done.stderr
    by_case = {line["case"]: line for line in found}
    for tool in gpu_day.TOOLS:
        assert by_case[tool]["outcome"] == "not run"
        assert by_case[tool]["why"]
    # what they are to watch calls each of the operators
    assert by_case["selection"]["outcome"] == "passed"
    for name in ("rms_norm", "add_rms_norm", "add_rms_norm_"):
        assert by_case[f"operator {name}"]["calls"] > 5


def test_a_dry_run_of_the_benchmarks_has_rows_rates_and_predictions(tmp_path):
    done, found = run(tmp_path, "--part", "bench", "--only", "geglu", "linear")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {name: [] for name in ("linear", "geglu")}  # in the order of what counts
    for line in found:
        if "row" in line:
            rows[line["benchmark"]].append(line["row"])
    assert [len(some) for some in rows.values()] == [4, 2]
    for row in (*rows["linear"], *rows["geglu"]):
        assert row["ours us"] > 0
        assert row["predicted us"] > 0
        assert "compile us" not in row
    assert {row["n"] for row in rows["linear"]} <= {72, 18}  # a GPU's cases, made tiny
    assert outcomes(found)["CUDA timing"] == "not run"
    tables = (tmp_path / "results.md").read_text()
    assert tables.index("### linear") < tables.index("### geglu")
    assert "copy GB/s" in tables
    assert "product TFLOP/s" in tables
    assert "| predicted us |" in tables
    assert "| ours us median |" in tables
    assert "torch us median" not in tables


def test_the_benchmarks_of_a_gpu_are_asked_for_with_their_budgets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        gpu_day.Run, "step", lambda _, case, command, seconds: asked.append((command, seconds))
    )
    args = argparse.Namespace(minutes=9.0, only=None)
    part = gpu_day.Run("bench", gpu_day.Machine("cuda", {}, None), tmp_path, args)
    part.bench()
    assert len(asked) == len(gpu_plan.BENCH)
    for step, (command, seconds) in zip(gpu_plan.BENCH, asked, strict=True):
        words = command[command.index("benchmarks.runner") + 1 :]
        assert words[0] == step.name
        assert words[words.index("--device") + 1] == "cuda"
        assert "--graph" in words
        assert "--rehearse" not in words
        assert "--without" not in words
        assert seconds == step.seconds
        assert float(words[words.index("--budget") + 1]) == step.seconds - gpu_plan.STARTING
        if step.only:
            assert words[words.index("--only") + 1] == step.only
    # of little time that is left the budget is less
    asked.clear()
    part.end = time.monotonic() + 30
    part.bench()
    assert all(float(c[c.index("--budget") + 1]) <= 20 for c, _ in asked)


def test_only_the_benchmarks_know_what_is_no_operator(capsys):
    with pytest.raises(SystemExit):
        gpu_day.main(["--dry-run", "--only", "model"])
    assert "there is no 'model'" in capsys.readouterr().err


def test_over_its_minutes_a_part_is_cut_off_and_says_so(tmp_path):
    start = time.monotonic()
    minutes = str((gpu_day.RESERVE + 1.5) / 60)
    done, found = run(
        tmp_path, "--part", "tests", "--minutes", minutes, "--jobs", "1", "--only", "rope", "sample"
    )
    assert time.monotonic() - start < 40
    assert done.returncode == 1
    said = outcomes(found)
    assert said["file tests/ops/test_rope.py"] == "cut off"
    assert said["file tests/ops/test_sample.py"] == "cut off"
    assert found[-1]["case"] == "end"
    assert "| file tests/ops/test_sample.py | cut off |" in (tmp_path / "results.md").read_text()


def nothing_is_left_of(group):
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_killed_run_leaves_what_it_had(tmp_path, how):
    results = tmp_path / "results.jsonl"
    process = subprocess.Popen(
        command(tmp_path, "--part", "tests", "--only", "cache_write", "rope"),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while "::test_" not in (results.read_text() if results.exists() else ""):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        if how == signal.SIGKILL:
            os.killpg(process.pid, how)  # as a time limit ends a command: all of it
        else:
            process.send_signal(how)  # the run ends what it has started itself
        assert process.wait(30) != 0
        assert nothing_is_left_of(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    found = lines.read(results)  # every line is whole
    assert any("::test_" in line["case"] for line in found)
    if how == signal.SIGKILL:
        assert found[-1]["case"] != "end"
        assert "The run was killed" in gpu_day.report(results)
    else:
        assert (found[-1]["case"], found[-1]["outcome"]) == ("end", "failed")


def test_without_a_gpu_a_run_that_is_not_dry_fails_and_says_why(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ["--part", "tests", "--out", str(tmp_path)]
    assert gpu_day.main(words) == 1
    (line,) = (x for x in lines.read(tmp_path / "results.jsonl") if x["case"] == "tests")
    assert line["outcome"] == "not run"
    assert "finds no CUDA device" in line["why"]


def test_a_part_that_is_run_again_replaces_its_tables(tmp_path):
    results = tmp_path / "results.jsonl"
    for outcome in ("failed", "passed"):
        facts = {"dry run": True, "gpu": "G"}
        lines.append(results, part="tests", case="start", outcome="passed", machine=facts)
        lines.append(results, part="tests", case="build", outcome=outcome)
        lines.append(results, part="tests", case="end", outcome="passed")
    text = gpu_day.report(results)
    assert "| build | passed |" in text
    assert "failed" not in text


# ---- what compute-sanitizer says ----------------------------------------------------------------

CLEAN = """========= COMPUTE-SANITIZER
......                                                                   [100%]
6 passed, 20 deselected in 9.12s
========= ERROR SUMMARY: 0 errors
"""
BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at softcap_kernel(SoftcapParams, bool)+0x1b0
=========     by thread (7,0,0) in block (0,0,0)
1 failed, 5 passed in 9.12s
========= ERROR SUMMARY: 3 errors
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at kernel+0x10
6 passed in 9.12s
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
"""


@pytest.mark.parametrize(
    ("code", "text", "outcome", "errors"),
    [
        (0, CLEAN, "passed", 0),
        (1, CLEAN, "failed", 0),  # a test failed under it
        (97, BOUNDS, "failed", 3),
        (97, RACES, "failed", 1),
        (0, RACES.replace("1 error", "0 errors"), "passed", 0),
        (1, REFUSED, "not run", None),
        (-11, "nothing", "failed", None),
    ],
)
def test_the_verdict_of_a_sanitizer(code, text, outcome, errors):
    found, values = gpu_day.verdict(code, text)
    assert (found, values.get("errors")) == (outcome, errors)
    if outcome != "passed":
        assert f"ended with {code}" in values["why"]
    if text is BOUNDS:
        assert "Invalid __global__ write" in values["why"]
        assert values["tests"] == "1 failed, 5 passed in 9.12s"


# ---- the proxy ----------------------------------------------------------------------------------


def test_copies_keep_strides_offsets_gaps_and_shared_memory():
    base = torch.arange(120.0)
    a, b = base[10:].as_strided((3, 4), (20, 2)), base[11:].as_strided((3, 4), (20, 2))
    copies = proxy.Copies(CPU)
    there = copies.arguments([a, b, base.view(torch.int32), None, 1.5])
    for one, other in zip((a, b), there, strict=False):
        assert torch.equal(one, other)
        assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset())
        assert one.data_ptr() != other.data_ptr()
    assert there[1].data_ptr() - there[0].data_ptr() == 4
    assert there[2].dtype == torch.int32
    assert there[2].untyped_storage().data_ptr() == there[0].untyped_storage().data_ptr()
    assert there[3:] == [None, 1.5]
    there[0].fill_(-1)
    assert (base >= 0).all()


@pytest.fixture
def proxied():
    """`proxied(name)`: the operator's proxy, in the place of its CPU kernel."""
    made = []

    def install(name):
        proxies = proxy.Proxies([name], CPU)
        proxies.install()
        made.append(proxies)
        return proxies.by_name[name]

    yield install
    for proxies in made:
        proxies.uninstall()


def test_results_in_place_come_back_into_the_same_memory(proxied):
    seam = proxied("add_rms_norm_")
    big = torch.full((6, 40), 7.0)
    residual, x, weight = big[2:5], torch.randn(3, 40), torch.randn(40)
    residual.copy_(torch.randn(3, 40))
    expected, y = reference.add_rms_norm(residual.clone(), x, weight, weight)
    address = residual.data_ptr()
    out = ops.add_rms_norm_(residual, x, weight, weight)
    assert seam.calls == 1
    assert residual.data_ptr() == address
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(out, y)
    assert (big[:2] == 7).all()
    assert (big[5] == 7).all()


def test_gradients_go_through_the_proxy(proxied):
    norm = proxied("rms_norm")
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    ops.rms_norm(x, weight).sum().backward()
    assert norm.calls == 1
    assert x.grad.abs().sum() > 0
    assert weight.grad.abs().sum() > 0


def test_errors_come_through_word_for_word(proxied):
    def texts():
        found = []
        for call in (
            lambda: ops.embed(torch.tensor([[0, 9]]), torch.ones(9, 4), 1.0),
            lambda: ops.embed(torch.tensor([0]), torch.ones(9, 4).T, 1.0),
            lambda: ops.embed(torch.tensor([0]).int(), torch.ones(9, 4), 1.0),
        ):
            with pytest.raises(ValueError, match="embed") as error:
                call()
            found.append(str(error.value))
        return found

    before = texts()
    embed = proxied("embed")
    assert texts() == before
    assert embed.calls == 0


def test_a_row_that_the_device_marks_is_the_cpu_kernels_error(proxied):
    sample = proxied("sample")
    logits = torch.full((1, 40), -torch.inf)
    with pytest.raises(ValueError, match="row 0 of logits is -infinity everywhere"):
        ops.sample(logits, None, 0, torch.tensor(0))
    # a device that marks a good row contradicts the CPU
    real = sample._there
    sample._there = lambda args, numbers: real(args, numbers) * 0 - 1
    with pytest.raises(proxy.ProxyError, match="nothing to refuse"):
        ops.sample(torch.zeros(1, 40), None, 0, torch.tensor(0))


def test_a_kernel_that_gives_other_bits_the_second_time_is_found(proxied):
    softcap = proxied("softcap")
    real, runs = softcap._there, []

    def flaky(args, numbers):
        runs.append(1)
        return real(args, numbers) * (1 + 1e-7 * len(runs))

    softcap._there = flaky
    with pytest.raises(proxy.ProxyError, match="two runs on the same arguments differ"):
        ops.softcap(torch.full((4,), 20.0), 30.0)
    assert softcap.differing == 1


def test_a_kernel_that_writes_into_its_input_is_found(proxied):
    softcap = proxied("softcap")
    real = softcap._there

    def careless(args, numbers):
        out = real(args, numbers)
        args[0].untyped_storage()[0] ^= 1
        return out

    softcap._there = careless
    with pytest.raises(proxy.ProxyError, match="no output has been changed"):
        ops.softcap(torch.ones(4), 30.0)


def test_taken_away_the_proxy_leaves_the_cpus_kernels():
    proxies = proxy.Proxies(["softcap"], CPU)
    proxies.install()
    ops.softcap(torch.ones(4), 30.0)
    proxies.uninstall()
    expected = proxies.by_name["softcap"].on_the_host((torch.ones(4), 30.0))
    assert torch.equal(ops.softcap(torch.ones(4), 30.0), expected)
    assert proxies.by_name["softcap"].calls == 1


def test_a_run_that_never_calls_its_operator_fails(tmp_path):
    test = tmp_path / "test_softcap.py"
    test.write_text("def test_nothing():\n    assert True\n")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.cuda.proxy"]
    done = subprocess.run(
        [sys.executable, *words, "--proxy-device", "cpu", str(test)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ERROR: softcap was never called" in done.stdout
    assert "1 passed" in done.stdout
