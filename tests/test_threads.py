"""Threads: they share models and the processor, and no token changes."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma2 import HybridCache, ops
from tests.concurrency import DEADLINE, NEVER, WORKS, greedy, prompt
from tests.model.factories import lively


@pytest.fixture
def restless() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Give what each work gives, in threads that start together."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        barrier.wait(DEADLINE)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result(DEADLINE) for done in [pool.submit(run, work) for work in works]]


def test_two_models_write_at_once(restless: None) -> None:
    wide = lively("three", vocab_size=20_000, intermediate_size=512)
    works = [
        functools.partial(greedy, lively("three"), prompt(900)),
        functools.partial(greedy, wide, prompt(1200, seed=1)),
        functools.partial(greedy, lively("27b"), prompt(700, seed=2)),
    ]
    alone = [work() for work in works]
    assert len(set(map(tuple, alone))) == len(works)
    for _ in range(3):
        for pair in itertools.combinations(range(len(works)), 2):
            assert at_once(*(works[n] for n in pair)) == [alone[n] for n in pair]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "names", [("greedy", "turns"), ("greedy", "sampled"), ("by hand", "sampled"), ("lookup", "beams"),
              ("penalty", "by hand")], ids="+".join,
)  # fmt: skip
def test_one_model_serves_two_threads(
    names: tuple[str, str], training: bool, restless: None
) -> None:
    """Each has a cache of its own, whose rings have wrapped. No thread leaves a mode behind."""
    model = copy.deepcopy(lively("three")).train(training)
    lengths = (170, 230)

    def work(name: str, length: int) -> list[int]:
        cache = HybridCache(model.config, 3, 400, keep_snapshots=1)
        new = WORKS[name](model, prompt(length), cache)
        assert cache.layers[0].wraps
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        return new

    works = [functools.partial(work, name, n) for name, n in zip(names, lengths, strict=True)]
    alone = [work() for work in works]
    for _ in range(3):
        assert at_once(*works) == alone
    assert all(module.training is training for module in model.modules())


def calls_of(operator: str, size: int) -> Callable[[], Tensor]:
    """A call that takes milliseconds, whose numbers depend on `size`."""
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    name, _, kind = operator.partition(" ")
    dtype = getattr(torch, kind or "float32")
    if name == "linear":
        x, w = draw(60, size, dtype=dtype), draw(size, size, dtype=dtype)
        return functools.partial(torch.ops.gemma2.linear, x, w)
    if name == "attention":
        q, k, v = (draw(1, 4, size, 64, dtype=dtype) for _ in range(3))
        where = torch.tensor([0]), torch.tensor([size])
        return lambda: ops.attention(q, k, v, *where, scale=0.1, softcap=50.0)[0]
    if name == "sample":
        logits, step = draw(8, 60 * size), torch.arange(8)
        return lambda: ops.sample(logits, None, 1, step, 1.0, 0, 0.9)
    x, w = draw(size, 1000, dtype=dtype), draw(1000, dtype=dtype)
    return lambda: ops.rms_norm(x, w, 1e-6)


@pytest.mark.parametrize(
    "operator",
    ["linear float32", "linear bfloat16", "linear float16", "attention float32",
     "attention bfloat16", "attention float16", "sample", "rms_norm bfloat16"],
)  # fmt: skip
def test_operators_run_at_once(operator: str) -> None:
    """Of their scratch nothing is shared."""
    torch.set_num_threads(1)
    calls = [calls_of(operator, size) for size in (600, 400)]
    alone = [call() for call in calls]

    def again(call: Callable[[], Tensor], wanted: Tensor) -> bool:
        return all(torch.equal(call(), wanted) for _ in range(25))

    works = [functools.partial(again, *pair) for pair in zip(calls, alone, strict=True)]
    assert at_once(*works) == [True, True]


def test_operators_let_other_threads_run() -> None:
    """While one runs in C++, pure Python goes on in another thread.

    Nobody is made to hand over: what the other thread counts, it counts because the lock was free.
    """
    x, w = torch.randn(512, 1024), torch.randn(1024, 1024)
    q, k = torch.randn(1, 8, 1024, 64), torch.randn(1, 8, 1024, 64)
    start, end = torch.tensor([0]), torch.tensor([1024])
    logits, step = torch.randn(64, 50_000), torch.zeros(64, dtype=torch.int64)
    operators = torch.ops.gemma2
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: operators.linear(x, w),
        "attention": lambda: ops.attention(q, k, k, start, end, scale=0.1, softcap=50.0),
        "sample": lambda: ops.sample(logits, None, 1, step, 1.0, 0, 0.9),
        "softcap": lambda: operators.softcap(logits, 30.0),
    }
    count, stop = 0, False

    def counting() -> None:
        nonlocal count
        while not stop:
            count += 1
            time.sleep(0)

    def counted(call: Callable[[], Any]) -> int:
        before = count
        call()
        return count - before

    torch.set_num_threads(1)
    thread = threading.Thread(target=counting)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        assert counted(lambda: sum(range(300_000))) == 0  # Python itself hands nothing over
        with torch.inference_mode():
            for name, call in calls.items():
                assert any(counted(call) > 1 for _ in range(50)), name
    finally:
        sys.setswitchinterval(interval)
        stop = True
        thread.join(DEADLINE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_number_of_threads_may_change_at_any_time(dtype: torch.dtype) -> None:
    """Between and during generations; with deterministic algorithms not a bit differs."""
    torch.use_deterministic_algorithms(True)
    model = copy.deepcopy(lively("three", vocab_size=20_000, intermediate_size=512)).to(dtype)
    options = {"output_logits": True, "return_dict_in_generate": True, **NEVER}

    def written(streamer: Any = None) -> tuple[Tensor, Tensor]:
        out = model.generate(prompt(700), max_new_tokens=10, streamer=streamer, **options)
        return out.sequences, torch.stack(out.logits)

    class Changing:
        def put(self, value: Tensor) -> None:
            torch.set_num_threads(3 - torch.get_num_threads())

        def end(self) -> None:
            pass

    torch.set_num_threads(1)
    wanted = written()
    for threads, streamer in ((2, None), (1, Changing()), (2, Changing())):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, written(streamer), wanted)), (threads, streamer)
