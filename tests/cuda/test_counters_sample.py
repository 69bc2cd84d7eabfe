"""What `sample` moves on CUDA, counted by the emulator: logits once, or twice for top-p and min-p."""

from __future__ import annotations

import pytest
import torch

from gemma2 import ops

pytestmark = pytest.mark.usefixtures("emulated")

VOCAB = 256000
PIECE = 4096
PIECES = 63
STEP = torch.tensor(0)
# What is asked for, the launches, and how many of them read the logits.
MODES = [
    ({"temperature": 0.0}, ("sample best", "sample best of pieces"), 1),
    ({"temperature": 0.8}, ("sample best", "sample best of pieces"), 1),
    ({"top_k": 50}, ("sample top-k", "sample choose"), 1),
    ({"top_k": 256, "top_p": 0.9, "min_p": 0.01}, ("sample top-k", "sample choose"), 1),
    ({"top_k": 5000}, ("sample top-k", "sample choose"), 1),
    ({"top_p": 0.95}, ("sample sum", "sample collect", "sample choose"), 2),
    ({"min_p": 0.05}, ("sample sum", "sample collect", "sample choose"), 2),
]


@pytest.fixture
def count(emulator):
    """`count(logits, top_k=50)`: the counters of the launches, by their names."""

    def count(logits, history=None, **options):
        with emulator.counting() as counters:
            ops.sample(logits, history, 0, STEP, **options)
        return counters

    return count


def make(rows, vocab, dtype):
    """A language model's: few columns are likely."""
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)


def read(counters, region):
    return sum(kernel["region_read"].get(region, 0) for kernel in counters.values())


def conflicts(kernel):
    """Wrappers whose accesses to shared memory had to be split."""
    return {name for name, bank in kernel["shared"].items() if bank["conflicts"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("options", "launches", "reads"), MODES, ids=str)
def test_logits_are_read_as_often_as_promised(count, dtype, options, launches, reads):
    logits = make(1, VOCAB, dtype)
    counters = count(logits, **options)
    assert set(counters) == set(launches)
    assert all(kernel["launches"] == 1 for kernel in counters.values())
    assert read(counters, "logits") == reads * logits.numel() * logits.element_size()
    for name, kernel in counters.items():
        if kernel["region_read"].keys() == {"logits"}:  # nothing but full requests
            traffic = kernel["global_read"]
            assert traffic["bytes"] == 32 * traffic["sectors"] == 512 * traffic["requests"]
        streams = name in ("sample best", "sample sum", "sample collect")
        assert not (streams and conflicts(kernel))
        assert "store" not in conflicts(kernel) or name == "sample choose"


@pytest.mark.parametrize(("options", "launches", "reads"), MODES, ids=str)
def test_rows_that_are_not_aligned_are_read_as_often(count, options, launches, reads):
    logits = make(2, 10001, torch.bfloat16)[:, :9999]
    counters = count(logits, **options)
    assert set(counters) == set(launches)
    assert read(counters, "logits") == reads * 2 * 9999 * 2


@pytest.mark.parametrize(("options", "launches", "reads"), MODES, ids=str)
def test_the_history_is_read_by_every_block_that_reads_logits(count, options, launches, reads):
    history = torch.randint(-1, VOCAB, (1, 3000), generator=torch.Generator().manual_seed(1))
    logits = make(1, VOCAB, torch.bfloat16)
    counters = count(logits, history, repetition_penalty=1.2, **options)
    assert set(counters) == set(launches)
    assert read(counters, "logits") == reads * 2 * VOCAB
    assert read(counters, "history") == reads * PIECES * 8 * 3000
    for name in ("sample best", "sample sum", "sample collect"):
        assert name not in counters or conflicts(counters[name]) <= {"atomic_or"}


def test_without_a_penalty_one_block_a_row_looks_at_the_history(count):
    history = torch.zeros(2, 100, dtype=torch.int64)
    counters = count(make(2, 3 * PIECE, torch.bfloat16), history)
    assert read(counters, "history") == 2 * 8 * 100


@pytest.mark.parametrize("k", [1, 50, 256, 1000])
def test_a_piece_leaves_at_most_twice_k_candidates(count, k):
    counters = count(make(1, VOCAB, torch.float32), top_k=k)
    written = counters["sample top-k"]["region_written"]["scratch"]
    assert PIECES * 8 * min(k, PIECE) <= written <= PIECES * (8 * 2 * k + 32)


def test_the_last_launch_reads_few_candidates_once(count):
    """They fit into shared memory from the start."""
    counters = count(make(1, VOCAB, torch.bfloat16), top_k=50, top_p=0.9)
    written = counters["sample top-k"]["region_written"]["scratch"]
    assert counters["sample choose"]["region_read"]["scratch"] <= 2 * written


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
@pytest.mark.parametrize(("vocab", "threads"), [(23, 32), (512, 32), (513, 64), (PIECE, 256)])
def test_a_short_row_takes_one_launch_of_few_threads(count, options, vocab, threads):
    logits = make(3, vocab, torch.float32)
    counters = count(logits, **options)
    (kernel,) = counters.values()
    assert kernel["launches"] == 1
    assert kernel["blocks"] == 3
    assert kernel["threads"] == 3 * threads
    assert kernel["region_read"].keys() <= {"logits", "step"}
    assert kernel["region_read"]["logits"] == 3 * 4 * vocab
    assert kernel["region_written"] == {"out": 24}
