"""Faults in attention's CUDA kernels, switched on one at a time: a comparison with float64 notices each.

One case has it all: a ring that wraps within a tile, a window, documents, queries that see no key,
NaN in every slot that no query sees. Each kernel that shows a fault must be caught with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gemma2 import reference
from gemma2.ops import attention

pytestmark = pytest.mark.usefixtures("emulated")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTH, CAPACITY, WINDOW = 430, 300, 220

# float32 and the approximate functions together; a rounded probability counts for ten times as much.
LSE_ERROR = 5e-6


class Kernel(NamedTuple):
    dtype: torch.dtype
    softcap: float
    queries: int
    multiprocessors: int = 132
    launches: frozenset[str] = frozenset()
    documents: bool = True


SPLIT, COMBINE = "decode split", "decode combine"
KERNELS = {
    "any": Kernel(F32, 20.0, 18, launches=frozenset({"attention_any"})),
    "prefill": Kernel(BF16, 20.0, 40, launches=frozenset({"attention_prefill"})),
    "prefill with a maximum": Kernel(F16, 20.0, 40, launches=frozenset({"attention_prefill"})),
    "prefill without a cap": Kernel(BF16, 0.0, 40, launches=frozenset({"attention_prefill"})),
    # Whose whole tiles take a path of their own.
    "prefill of one document": Kernel(
        BF16, 20.0, 40, launches=frozenset({"attention_prefill"}), documents=False
    ),
    "decode": Kernel(BF16, 20.0, 6, launches=frozenset({SPLIT, COMBINE})),
    "decode with a maximum": Kernel(F16, 20.0, 6, launches=frozenset({SPLIT, COMBINE})),
    "decode in one split": Kernel(BF16, 20.0, 6, 1, frozenset({SPLIT})),
}
EVERY = tuple(KERNELS)
CAPPED = tuple(name for name in EVERY if KERNELS[name].softcap)
WITH_MAXIMUM = (*(name for name in EVERY if name.endswith(("maximum", "cap"))), "any")
TENSOR_CORES = EVERY[1:]
OF_DOCUMENTS = tuple(name for name in EVERY if KERNELS[name].documents)
CAUGHT_IN = {
    "cap_dropped": CAPPED,
    "window_off_by_one": EVERY,
    "future_visible": EVERY,
    "documents_ignored": OF_DOCUMENTS,
    "ring_slot_misread": EVERY,
    "groups_interleaved": EVERY,
    "split_left_out": ("decode", "decode with a maximum"),
    "splits_unweighted": ("decode with a maximum",),
    "lse_from_rounded": TENSOR_CORES,
    "lse_without_maximum": WITH_MAXIMUM,
    "waits_too_little": TENSOR_CORES,
}


def arguments(kernel: Kernel) -> tuple[Tensor | None, ...]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, kernel.queries, 64, generator=g)
    k, v = torch.randn(2, 1, 2, CAPACITY, 64, generator=g)
    q, k, v = (x.to(kernel.dtype) for x in (q, k, v))
    start = LENGTH - kernel.queries
    kv_start = torch.zeros(1, kernel.queries, dtype=torch.int64)
    kv_start[0, ::2] = LENGTH - WINDOW + 20  # every other query is of a document that began there
    kv_start[0, 1] = LENGTH  # sees nothing
    at = torch.tensor([start]), torch.tensor([LENGTH]), kv_start if kernel.documents else None
    seen = reference.visible(at[0], kernel.queries, at[1], CAPACITY, at[2], None, WINDOW)
    dead = ~seen.any(1)[:, None, :, None]
    assert dead.any()
    return q, k.masked_fill(dead, math.nan), v.masked_fill(dead, math.nan), *at


def check(kernel: Kernel) -> None:
    """The kernel gives what float64 gives."""
    args = arguments(kernel)
    kw = {"scale": 0.4, "softcap": kernel.softcap, "window": WINDOW}
    out, lse = attention(*args, **kw)
    exact, exact_lse = reference.attention(
        *(a.double() if a is not None and a.is_floating_point() else a for a in args), **kw
    )
    eps = torch.finfo(kernel.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps + 1e-5)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=0, atol=LSE_ERROR)


@pytest.fixture
def kernel(request, monkeypatch):
    """The kernel of this name, on a device of its size."""
    kernel = KERNELS[request.param]
    monkeypatch.setenv("GEMMA2_EMULATED_MULTIPROCESSORS", str(kernel.multiprocessors))
    return kernel


@pytest.mark.parametrize("kernel", EVERY, indirect=True)
def test_without_a_fault_attention_is_that_of_float64(emulator, kernel):
    with emulator.counting() as counters:
        check(kernel)
    assert set(counters) == kernel.launches  # the kernel is the one that is meant


@pytest.mark.parametrize(
    ("mutation", "kernel"),
    [(m, name) for m, names in CAUGHT_IN.items() for name in names],
    indirect=["kernel"],
)
def test_a_fault_of_attention_is_noticed(emulator, mutation, kernel):
    found = (AssertionError, "not close")
    if mutation == "waits_too_little":
        found = (RuntimeError, "an asynchronous copy to it is under way")
    with emulator.mutated(mutation), pytest.raises(found[0], match=found[1]):
        check(kernel)
