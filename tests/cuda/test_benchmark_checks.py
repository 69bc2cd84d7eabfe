"""What the benchmarks assert before they time: the CUDA kernels pass it, faulty ones do not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention, linear

pytestmark = pytest.mark.usefixtures("emulated")

CPU = torch.device("cpu")


def case(queries, keys, window=0, D=256, batch=1):
    kind = "prefill" if queries == keys else "decode"
    return {
        "kind": kind,
        "heads": (4, 2, D),
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "window": window,
        "dtype": "bfloat16",
    }


CASES = {
    "prefill": case(128, 128),
    "prefill with a window": case(192, 192, 64, 128),
    "decode": case(1, 1024),
    "verification with a window": case(5, 700, 128, batch=2),
}


def errors(benchmark, case, names):
    """Gives the errors that the row would show, by variant of ours."""
    parts = benchmark.run(case, CPU)
    assert set(names) < set(parts["checked"])
    with torch.inference_mode():
        return [parts["check"](parts[name]) for name in names]


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_of_attention_are_far_inside_the_bound(emulated, name):
    before = emulated.blocks()
    for error in errors(attention, CASES[name], ("ours", "deterministic")):
        assert 1e-4 < error < 4e-3
    assert emulated.blocks() > before


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        *(("cap_dropped", name) for name in CASES),
        # To a single query that sees all keys it makes no difference in which slot they are.
        *(("ring_slot_misread", name) for name in CASES if name != "decode"),
        *(("groups_interleaved", name) for name in CASES),
        *(("future_visible", name) for name in CASES if "prefill" in name),
        ("split_left_out", "decode"),
    ],
)
def test_a_fault_in_a_kernel_of_attention_is_noticed(emulated, fault, name):
    with emulated.mutated(fault), pytest.raises(AssertionError, match="wrong result: error"):
        errors(attention, CASES[name], ("ours",))


@pytest.fixture
def linear_too(emulated):
    emulated.library.gemma2_emulate_linear(True)
    yield
    emulated.library.gemma2_emulate_linear(False)


@pytest.mark.usefixtures("linear_too")
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_the_kernels_of_linear_are_far_inside_the_bound(emulated, rows):
    before = emulated.blocks()
    case = {"rows": rows, "n": 64, "k": 512, "dtype": "bfloat16"}
    for error in errors(linear, case, ("ours", "kernel")):
        assert 1e-4 < error < 4e-3
    assert emulated.blocks() > before
