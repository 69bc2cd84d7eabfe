"""What the benchmarks do on a GPU, rehearsed on the CPU: the same cases made tiny, the same code."""

from __future__ import annotations

import importlib
import signal
import sys
import time
import types

import pytest
import torch

from benchmarks import attention, check, gpu_plan, linear, model, model_gpu, runner, tables, timing
from benchmarks.predict import predict
from gemma2 import ops, reference
from gemma2.bench import Timing
from tests.cuda import gpu_day

CPU = torch.device("cpu")
GPU_MEMORY = 70e9
WITH_GPU_CASES = ("attention", "linear", "model")
PREFILL = {
    "kind": "prefill",
    "heads": (8, 4, 256),
    "batch": 1,
    "queries": 128,
    "keys": 128,
    "window": 64,
    "dtype": "bfloat16",
}
DECODE = {**PREFILL, "kind": "decode", "batch": 2, "queries": 1}


def rehearse(name, only="", **options):
    options = {"seconds": 0.0, "without": gpu_plan.COMPILED, "rehearse": True, **options}
    return runner.run_benchmark(name, only=only, copy=1e10, product=1e11, **options)


# ---- every case runs ----------------------------------------------------------------------------


def test_every_case_of_attention_is_checked_and_timed_at_a_tiny_size():
    rows = rehearse("attention")
    assert {row["heads"] for row in rows} == set(attention.HEADS.values())
    assert {(row["kind"], bool(row["window"])) for row in rows} == {
        (kind, window) for kind in ("prefill", "decode") for window in (False, True)
    }
    for row in rows:
        assert "trouble" not in row, row
        for name in ("ours", "deterministic"):
            assert 0 < row[f"{name} error"] < 5e-3
            assert row[f"{name} us"] > 0
        assert row["eager us"] > 0
        assert row["predicted us"] > 0
        assert row["share of product" if row["kind"] == "prefill" else "share of copy"] > 0


def test_every_case_of_linear_is_checked_and_timed_at_a_tiny_size():
    rows = rehearse("linear")
    assert {row["rows"] for row in rows} == {1, 2, 4, 8, 16, 64, 512}
    for row in rows:
        assert "trouble" not in row, row
        for name in ("ours", "kernel", "torch"):
            assert 0 < row[f"{name} error"] < 5e-3
        assert row["predicted us"] > 0


@pytest.mark.parametrize(
    "only",
    [
        "kind=decode tokens=512 batch=1",
        "kind=prefill tokens=2048",
        "kind=decode tokens=8192 batch=8",
    ],
)
def test_the_model_and_transformers_are_timed_with_the_same_weights(only):
    rows = rehearse("model", only=f"size=2b {only}")
    assert {row["peer"] for row in rows} == (
        {"eager", "compiled"} if "tokens=512" in only else {"eager"}
    )
    for row in rows:
        assert "trouble" not in row, row
        assert "not timed" not in row, row
        peer = f"transformers, {row['peer']}"
        assert row["ours tokens/s"] > 0
        assert row[f"{peer} tokens/s"] == pytest.approx(
            row["ours tokens/s"] / row[f"x {peer}"], rel=1e-6
        )
        assert ("no graph us" in row) == ("decode tokens=512" in only and row["peer"] == "eager")
        assert row["share of product" if row["kind"] == "prefill" else "share of copy"] > 0


@pytest.mark.parametrize("name", WITH_GPU_CASES)
def test_every_case_has_a_prediction(name):
    for case in importlib.import_module(f"benchmarks.{name}").cuda_cases():
        found = predict(name, case, runner.REHEARSED)
        assert found is not None, case
        assert 1e-6 < found["low"] <= found["seconds"] <= found["high"] < 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("attention", attention.peak_bytes),
        ("linear", linear.peak_bytes),
        ("model", lambda case: model_gpu.peak_bytes(case, model.sized(case["size"]))),
    ],
)
def test_every_case_fits_a_gpu(name, peak):
    sizes = [peak(case) for case in importlib.import_module(f"benchmarks.{name}").cuda_cases()]
    assert 3e9 < max(sizes) < GPU_MEMORY


def test_caches_of_the_largest_case_are_counted():
    case = {**DECODE, "heads": (32, 16, 128), "batch": 64, "keys": 32768, "window": 0}
    caches = 2 * 64 * 16 * 32768 * 128 * 2  # 17 GB, and twice as much when torch repeats them
    assert attention.cache_bytes(case) == caches
    assert attention.peak_bytes(case) > 3 * caches
    assert attention.eager_bytes(case) > attention.EAGER_BYTES


def test_the_eager_peer_is_left_out_with_the_reason_where_its_scores_do_not_fit(monkeypatch):
    monkeypatch.setattr(attention, "EAGER_BYTES", 1000)
    monkeypatch.setattr(model_gpu, "EAGER_BYTES", 1000)
    parts = attention.run(DECODE, CPU)
    assert "eager" not in {name for name, part in parts.items() if callable(part)}
    assert parts["eager"].startswith("its scores would need")
    row = rehearse("model", only="size=2b kind=prefill tokens=2048")[0]
    assert row["transformers, eager us"] is None
    assert "MemoryError: the prompt's scores would need" in row["not timed"]


# ---- wrong results have no speed ----------------------------------------------------------------


def uncapped(q, k, v, start, length, **options):
    return ops.attention(q, k, v, start, length, **{**options, "softcap": 0.0})


def unbounded(q, k, v, start, length, **options):
    return ops.attention(q, k, v, start, length, **{**options, "window": 0})


def too_short_a_window(q, k, v, start, length, **options):
    window = options["window"] and options["window"] // 2
    return ops.attention(q, k, v, start, length, **{**options, "window": window})


def without_the_last_tile(q, k, v, start, length, **options):
    out, lse = ops.attention(q, k, v, start, length, **options)
    out[:, -1:, -32:] = 0
    return out, lse


def heads_exchanged(q, k, v, start, length, **options):
    return ops.attention(q, k.flip(1), v.flip(1), start, length, **options)


def nothing_written(q, k, v, start, length, **options):
    out, lse = ops.attention(q, k, v, start, length, **options)
    return torch.full_like(out, torch.nan), lse


@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    "wrong",
    [
        uncapped,
        unbounded,
        too_short_a_window,
        without_the_last_tile,
        heads_exchanged,
        nothing_written,
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_wrong_kernel_of_attention_fails_its_case(
    monkeypatch, tmp_path, wrong, case, deterministic
):
    def kernel(*args, deterministic=False, **options):
        chosen = wrong if deterministic == which else ops.attention
        return chosen(*args, deterministic=deterministic, **options)

    which = deterministic
    monkeypatch.setattr(attention, "ops", types.SimpleNamespace(attention=kernel))
    monkeypatch.setattr(attention, "cuda_cases", lambda: [case])
    monkeypatch.setattr(attention, "tiny", lambda case: case)
    (row,) = rehearse("attention", lines=tmp_path / "lines")
    name = "deterministic" if deterministic else "ours"
    assert row["trouble"].startswith(f"failed: AssertionError: {name}: wrong result: error")
    assert not [key for key in row if key.endswith(" us")]
    assert '"outcome": "failed"' in (tmp_path / "lines").read_text()


def test_a_right_kernel_passes_the_cases_that_wrong_ones_fail(monkeypatch):
    monkeypatch.setattr(attention, "cuda_cases", lambda: [PREFILL, DECODE])
    monkeypatch.setattr(attention, "tiny", lambda case: case)
    assert all("trouble" not in row for row in rehearse("attention"))


def test_a_wrong_product_fails_its_case(monkeypatch):
    def product(x, weight):
        return ops.linear(x, weight) * 1.02

    monkeypatch.setattr(linear, "ops", types.SimpleNamespace(linear=product))
    (row,) = rehearse("linear", limit=1)
    assert row["trouble"].startswith("failed: AssertionError: ours: wrong result: error 2.")


def test_a_peer_with_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(attention, "flex", lambda *_: lambda q, k, v: torch.zeros_like(q))
    row = runner.run_case(attention, DECODE, 0.0, without=["compile"])
    assert row["flex us"] is None
    assert row["not timed"].startswith("flex: AssertionError: flex: wrong result: error 1.")
    assert row["ours us"] > 0


def test_flex_attention_has_the_cap_the_window_and_the_offset_of_the_queries():
    row = runner.run_case(attention, {**DECODE, "queries": 5}, 0.0, without=["compile"])
    assert 0 < row["flex error"] < 5e-3


def test_scores_reach_several_times_the_cap_and_uncapped_results_are_far_away():
    parts = attention.run(DECODE, CPU)
    q, k, _ = parts["check"]._make.args
    k = k.repeat_interleave(2, 1)
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    assert scores.abs().max() > 3 * attention.CAP
    assert scores.abs().mean() > 0.5 * attention.CAP
    apart, _ = check.relative(parts["check"]._mistake(), parts["check"].exact)
    assert apart > 0.5


def test_the_exact_result_is_that_of_the_reference_whatever_the_pieces(monkeypatch):
    draw = timing.Draw(CPU)
    q, k, v = draw.normal(2, 8, 50, 64) * 50, *draw.normal(2, 2, 4, 70, 64)
    start, length = torch.full((2,), 20), torch.full((2,), 70)
    for window, cap in ((0, 50.0), (16, 50.0), (16, 0.0)):
        rule = {"scale": 64**-0.5, "window": window}
        expected, _ = reference.attention(
            q.double(), k.double(), v.double(), start, length, softcap=cap, **rule
        )
        for pieces in (1 << 28, 8 * 70 * 7):
            monkeypatch.setattr(attention, "_EXACT_SCORES", pieces)
            found = attention.exact(q, k, v, cap=cap, **rule)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_visible_pairs_are_counted():
    for queries, keys, window in ((7, 7, 0), (7, 7, 3), (2, 9, 0), (5, 9, 4)):
        start, length = torch.tensor([keys - queries]), torch.tensor([keys])
        seen = reference.visible(start, queries, length, keys, window=window)
        assert attention.pairs(queries, keys, window) == int(seen.sum())


def test_a_check_whose_inputs_show_nothing_fails():
    exact = torch.ones(4, 8)
    blind = check.Check(lambda: exact, torch.bfloat16, mistake=lambda: exact * 1.05)
    with pytest.raises(AssertionError, match=r"shows nothing: with the mistake .* only 5\.0e-02"):
        blind(lambda: exact.bfloat16())
    seeing = check.Check(lambda: exact, torch.bfloat16, mistake=lambda: exact * 1.5)
    assert seeing(lambda: exact.bfloat16()) == 0


def test_an_error_in_a_single_row_is_seen_among_many():
    exact = torch.ones(100_000, 8)
    out = exact.clone()
    out[77_777] *= 1.1
    all_rows, worst = check.relative(out, exact)
    assert all_rows < 1e-3
    assert worst == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(AssertionError, match=r"worst row 1\.0e-01"):
        check.Check(lambda: exact, torch.bfloat16)(lambda: out.bfloat16())


def test_a_result_of_another_shape_is_wrong():
    with pytest.raises(AssertionError, match=r"shape \[4, 7\], not \[4, 8\]"):
        check.Check(lambda: torch.ones(4, 8), torch.float32)(lambda: torch.ones(4, 7))


# ---- graphs change no token ---------------------------------------------------------------------


class Writer:
    """Writes what it is told, by whether it is drawn and whether there is a graph."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, ids, *, do_sample, cuda_graph, max_new_tokens, **_):
        text = self.texts.get((do_sample, cuda_graph), list(range(max_new_tokens)))
        return torch.cat([ids, torch.tensor([text])], dim=1)


def test_a_graph_that_changes_a_token_fails_the_case():
    ids = torch.ones(1, 3, dtype=torch.int64)
    model_gpu.assert_same_text(Writer({}), ids, 4)
    with pytest.raises(AssertionError, match="the greedy texts differ from token 2"):
        model_gpu.assert_same_text(Writer({(False, None): [0, 1, 7, 3]}), ids, 4)
    with pytest.raises(AssertionError, match="the drawn texts differ from token 3"):
        model_gpu.assert_same_text(Writer({(True, None): [0, 1, 2, 9]}), ids, 4)


def test_decoding_one_row_asserts_that_the_graph_changes_nothing(monkeypatch):
    def differ(*_):
        raise AssertionError("with and without a graph the greedy texts differ from token 3")

    monkeypatch.setattr(model_gpu, "assert_same_text", differ)
    (row,) = rehearse("model", only="size=2b kind=decode tokens=512 batch=1 new=64 peer=eager")
    assert row["trouble"].startswith("failed: AssertionError: with and without a graph")
    assert "ours us" not in row


def test_steps_are_timed_after_the_first_ones():
    settling = [100.0 * i for i in range(model_gpu.SETTLING)]
    times = [*settling, 1000.0, 1002.0, 1004.0]
    took = model_gpu.time_steps(lambda: times)
    assert (took.min, took.median, took.runs) == (2.0, 2.0, model_gpu.RUNS)


def test_a_step_reads_every_weight_and_the_keys_that_are_seen():
    config = model.sized("2b")
    weights = 2_614_341_888  # as published, the tied head once
    assert model_gpu.parameter_count(config) == weights
    token = 2 * config.num_key_value_heads * config.head_dim  # of a layer
    assert model_gpu.bytes_of_step(config, 1, 100, 2) == 2 * (weights + 26 * 100 * token)
    seen = 13 * 8192 + 13 * 4096
    assert model_gpu.bytes_of_step(config, 8, 8192, 2) == 2 * (weights + 8 * seen * token)


# ---- budgets ------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """Cases of which a peer needs a second to get ready."""
    ready = set()

    def peer(case):
        if case["n"] not in ready:
            time.sleep(1)
            ready.add(case["n"])

    module = types.ModuleType("benchmarks.slow")
    module.cases = lambda: [{"n": n} for n in range(3)]
    module.run = lambda case, device: {"ours": lambda: None, "peer": lambda: peer(case)}
    monkeypatch.setitem(sys.modules, "benchmarks.slow", module)
    monkeypatch.setattr(runner, "CASE_SECONDS", 0.2)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # which imports for seconds


def test_a_peer_that_is_not_ready_in_time_costs_neither_its_case_nor_later_ones(slow):
    rows = rehearse("slow", end=time.monotonic() + 2.6)
    assert [row["n"] for row in rows] == [0, 1, 2]
    assert all(row["ours us"] >= 0 for row in rows)
    assert rows[0]["peer us"] > 0
    assert rows[2]["peer us"] is None
    assert rows[2]["not timed"] == "peer: TimeoutError: over the time budget"


def test_a_time_limit_ends_and_leaves_no_alarm():
    handler = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="over the time budget"), timing.time_limit(start + 0.05):
        time.sleep(5)
    assert time.monotonic() - start < 2
    with timing.time_limit(time.monotonic() + 0.05):
        pass
    time.sleep(0.1)  # the second alarm would be heard here
    assert signal.getsignal(signal.SIGALRM) is handler
    with pytest.raises(TimeoutError), timing.time_limit(start):
        raise RuntimeError("this must not be run")


def test_after_a_fault_of_the_device_the_other_cases_are_not_run(slow, monkeypatch):
    monkeypatch.setattr(runner, "_make_room", lambda device: "the device is lost")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no GPU")
    monkeypatch.setattr(runner, "run_case", lambda module, case, *_: dict(case))
    rows = runner.run_benchmark("slow", device=torch.device("cuda"))
    assert [row.get("trouble") for row in rows] == [None, *["not run: the device is lost"] * 2]


@pytest.mark.parametrize("name", WITH_GPU_CASES)
def test_the_gpu_day_runs_every_case_of_these_once(name):
    steps = [step for step in gpu_plan.BENCH if step.name == name]
    module = importlib.import_module(f"benchmarks.{name}")
    chosen = [
        runner.words_of(case)
        for step in steps
        for case in runner.chosen_cases(module, torch.device("cuda"), step.only)
    ]
    assert sorted(chosen) == sorted(map(runner.words_of, module.cuda_cases()))
    assert len(set(chosen)) == len(chosen)


def test_the_gpu_day_has_something_of_every_benchmark():
    planned = {step.name for step in gpu_plan.BENCH}
    assert planned == set(runner.available()) - set(gpu_plan.LEFT_OUT)
    for step in gpu_plan.BENCH:
        module = importlib.import_module(f"benchmarks.{step.name}")
        assert len(runner.chosen_cases(module, torch.device("cuda"), step.only)) >= 2, step


def test_what_counts_most_comes_first():
    first, second, third, fourth = gpu_plan.BENCH[:4]
    (prefill, longer), module = attention.cuda_cases()[:2], attention
    assert (prefill["keys"], longer["keys"]) == (2048, 8192)
    assert prefill in runner.chosen_cases(module, torch.device("cuda"), first.only)
    assert (second.name, second.only) == ("attention", "kind=decode")
    assert (third.name, fourth.name, fourth.only) == ("linear", "model", "size=2b")


def test_the_gpu_days_benchmarks_fit_into_its_nine_minutes():
    minutes = 9 * 60 - gpu_day.RESERVE
    seconds = [step.seconds for step in gpu_plan.BENCH]
    models = 1 + max(i for i, step in enumerate(gpu_plan.BENCH) if step.name == "model")
    assert sum(seconds[:models]) + gpu_plan.FIRST_BUILD <= minutes
    assert sum(seconds) + gpu_plan.LATER_BUILD <= minutes
    for step in gpu_plan.BENCH:
        module = importlib.import_module(f"benchmarks.{step.name}")
        cases = runner.chosen_cases(module, torch.device("cuda"), step.only)
        assert step.seconds >= gpu_plan.STARTING + (0.6 if step.name == "linear" else 1.5) * len(
            cases
        )


# ---- tables -------------------------------------------------------------------------------------


def test_a_compact_table_has_ours_the_peers_ratios_rates_and_the_prediction(monkeypatch):
    module = types.ModuleType("benchmarks.known")
    module.run = lambda case, device: {
        "ours": Timing(1e-3, 2e-3, 5),
        "peer": Timing(3e-3, 4e-3, 5),
        "other": RuntimeError("does not compile"),
        "flop": 2e9,
        "tokens": 10,
        "peak GB": 1.5,
    }
    row = runner.run_case(module, {"n": 1, "tokens": 7}, 0.0, product=4e12)
    monkeypatch.setattr(
        "benchmarks.predict.predict",
        lambda *_: {"seconds": 5e-4, "low": 4e-4, "high": 6e-4, "bound": "products"},
    )
    runner.add_prediction(row, "known", {"n": 1}, "a GPU")
    head, _, line = tables.compact([row]).splitlines()
    cells = dict(
        zip(
            *([cell.strip() for cell in text.strip("|").split("|")] for text in (head, line)),
            strict=True,
        )
    )
    assert cells == {
        "n": "1",
        "tokens": "7",
        "ours us": "1000",
        "ours us median": "2000",
        "peer us": "3000",
        "x peer": "3",
        "ours TFLOP/s": "2",
        "ours tokens/s": "10000",
        "share of product": "0.5",
        "predicted us": "500",
        "predicted range us": "400 to 600",
        "bound": "products",
        "measured / predicted": "2",
        "peak GB": "1.5",
        "not timed": "other: RuntimeError: does not compile",
    }
    assert list(cells)[:5] == ["n", "tokens", "ours us", "ours us median", "peer us"]


def test_a_prediction_is_not_compared_with_a_rehearsal():
    row = {"ours us": 5.0}
    runner.add_prediction(row, "attention", attention.cuda_cases()[0], None)
    assert row["predicted us"] > 0
    assert "measured / predicted" not in row
