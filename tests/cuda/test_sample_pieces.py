"""`sample` on CUDA where a row is several pieces, which the operator's own tests rarely are.

Tokens are the CPU kernel's: it takes the same integers, and other ways to the same sets.
"""

from __future__ import annotations

import pytest
import torch

from gemma2 import ops
from tests.cuda.emulation import Order, operators_library

PIECE = 4096
LISTED = 8192  # candidates that the last launch holds in shared memory


@pytest.fixture
def agree(emulator):
    """`agree(logits, top_k=50)`: the same tokens from both devices, in two orders of threads."""

    def agree(logits, history=None, **options):
        for n, order in enumerate((Order.RANDOM, Order.BACKWARD)):
            step = torch.tensor(n)
            expected = ops.sample(logits, history, 11, step, **options)
            emulator.configure(seed=n, order=order)
            emulator.install(operators_library())
            try:
                tokens = ops.sample(logits, history, 11, step, **options)
            finally:
                emulator.uninstall(operators_library())
                emulator.configure()
            assert torch.equal(tokens, expected), f"{tokens} instead of {expected}, {options}"

    return agree


def normal(rows, vocab, spread=4.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread


@pytest.mark.parametrize("vocab", [PIECE + 1, 2 * PIECE, 2 * PIECE + 100, 20000])
@pytest.mark.parametrize("k", [1, 40, 255, 256, 257, 3000, PIECE, 5000, LISTED])
def test_top_k_of_any_size(agree, vocab, k):
    agree(normal(2, vocab), top_k=k)
    agree(normal(2, vocab).bfloat16(), top_k=k, top_p=0.8)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 3},
        {"top_k": 300},
        {"top_p": 0.5},
        {"top_p": 0.999, "min_p": 1e-4},
        {"min_p": 0.3},
    ],
    ids=str,
)
def test_equal_scores_in_all_pieces(agree, options):
    vocab = 4 * PIECE
    agree(torch.zeros(1, vocab), **options)
    agree(normal(2, vocab, spread=1.0).round(), **options)
    agree((normal(2, vocab) > 0).half(), **options)


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.97, 0.999999, 1 - 1e-12])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 50.0])
def test_top_p_of_peaks_and_plains(agree, top_p, temperature):
    """From one candidate to all of them, which are more than shared memory takes."""
    agree(normal(2, 3 * LISTED), top_p=top_p, temperature=temperature)
    agree(normal(1, 3 * LISTED), top_p=top_p, temperature=temperature, top_k=LISTED + 1)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.9}], ids=str)
def test_pieces_without_a_score(agree, options):
    logits = torch.full((2, 3 * PIECE), -torch.inf)
    logits[0, -1] = -1e30
    logits[1, PIECE + 5 : PIECE + 9] = torch.tensor([3.0, 2.0, 3.0, -40.0])
    agree(logits, **options)


def test_magnitudes_that_exponentials_do_not_have(agree):
    logits = normal(2, 2 * PIECE) * 1e30
    for options in ({}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}):
        agree(logits, **options)
        agree(logits * 1e-37, **options)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}], ids=str
)
@pytest.mark.parametrize("at", [0, PIECE, 3 * PIECE - 1])
def test_nan_and_emptiness_are_found_in_any_piece(emulator, options, at):
    step = torch.tensor(0)
    logits = normal(2, 3 * PIECE)
    logits[1, at] = torch.nan
    emulator.install(operators_library())
    try:
        with pytest.raises(ValueError, match="row 1 of logits has NaN"):
            ops.sample(logits, None, 0, step, **options)
        with pytest.raises(ValueError, match="row 0 of logits is -infinity everywhere"):
            ops.sample(torch.full_like(logits, -torch.inf), None, 0, step, **options)
    finally:
        emulator.uninstall(operators_library())


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 30}, {"top_p": 0.9}], ids=str
)
def test_the_history_reaches_every_piece(agree, options):
    logits = normal(2, 3 * PIECE + 7)
    likely = logits.topk(60).indices
    edges = torch.tensor([[-1, 0, PIECE - 1, PIECE, 3 * PIECE, 3 * PIECE + 6, -5]]).expand(2, -1)
    for length in (1, 60):
        history = torch.cat([likely[:, :length], edges, likely[:, :length]], dim=1)
        agree(logits, history, repetition_penalty=3.0, **options)
        agree(logits, history, repetition_penalty=0.7, **options)
