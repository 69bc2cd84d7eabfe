"""What the benchmarks share: inputs in turns, compiled peers, CUDA graphs, rates to compare with.

A GPU's second-level cache holds tens of megabytes, more than most operators move in a call. In a
model other layers run between two calls, so a benchmark that uses one set of buffers again and again
would measure that cache. `Inputs` makes as many sets as fill it twice; what calls return is kept
for a round, so that outputs do not share one buffer either. On the CPU there is one set.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.bench import Timing, measure

__all__ = [
    "Draw",
    "Inputs",
    "Turns",
    "compiled",
    "copy_rate",
    "last_level_cache",
    "product_rate",
    "time_limit",
    "timer",
]

MOST_SETS = 512  # of small inputs; a graph has a node for each kernel of each set
MOST_BYTES = 4 << 30  # of all sets of a case
COPY_BYTES = 256 << 20  # at least, of the copy that figures are compared with
PRODUCT = 8192  # rows, columns and depth of the product that figures are compared with
GRAPH_BELOW = 100e-6  # seconds of a call, below which Python's share of it is worth removing


class Draw:
    """Random inputs on a device, the same in every run, from a generator of their own."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


class Turns:
    """A call without arguments that takes the next of several sets of inputs each time."""

    def __init__(self, function: Callable[..., object], sets: Sequence[Any]) -> None:
        self.function = function
        self.round = len(sets)  # calls until the first set comes again
        self._turns = itertools.cycle(sets)
        self._kept: collections.deque[object] = collections.deque(maxlen=self.round)

    def __call__(self) -> object:
        out = self.function(*next(self._turns))
        if self.round > 1:
            self._kept.append(out)
        return out

    def forget(self) -> None:
        """Let go of the results of the last round."""
        self._kept.clear()


class Inputs:
    """Sets of a benchmark's inputs.

    Args:
        make: draws one set, the arguments of a call.
        moved: bytes that a call reads and writes.
        device: where; on the CPU there is one set unless `cold` is given.
        cold: on the CPU as many sets as move this many bytes together.
    """

    def __init__(
        self, make: Callable[[], Sequence[Any]], moved: int, device: torch.device, cold: int = 0
    ) -> None:
        if device.type == "cuda":
            cold = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        first = make()
        storages = [t.untyped_storage() for t in first if isinstance(t, Tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        fit = MOST_BYTES // max(1, sum(sizes.values()))
        number = max(1, min(MOST_SETS, fit, math.ceil(cold / max(1, moved))))
        self.sets = [first, *(make() for _ in range(number - 1))]
        # For the row: whether a GPU's cache cannot hold what a round moves.
        self.note = {"cold": number * moved >= cold} if device.type == "cuda" else {}

    def call(self, function: Callable[..., object]) -> Turns:
        """Give the call of `function` on the sets in turns."""
        return Turns(function, self.sets)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give torch.compile's form of `function`; it is compiled, or fails, at its first call."""
    return torch.compile(function, fullgraph=True, dynamic=False)


# ---- timing -------------------------------------------------------------------------------------


def captured(call: Turns) -> Callable[[], None]:
    """Give the replay of a CUDA graph of one round of calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiling, handles, autotuning: before the capture
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    call.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(call.round):
            call()
    call.forget()  # the buffers stay the graph's
    return graph.replay


def timer(
    call: Callable[[], object], device: torch.device, graph: bool = False
) -> Callable[[float], Timing]:
    """Give a function that times `call` for some seconds; with `graph` as replays of a CUDA graph.

    Raises:
        Exception: `call` does not run, or cannot be captured.
    """
    if device.type != "cuda":
        return lambda seconds: measure(call, seconds, least=3, warm_up=1)
    if not graph:
        return lambda seconds: measure(call, seconds, least=3, warm_up=1, device=device)
    turns = call if isinstance(call, Turns) else Turns(call, [()])
    replay = captured(turns)

    def time_replays(seconds: float) -> Timing:
        took = measure(replay, seconds, least=3, warm_up=1, device=device)
        return dataclasses.replace(
            took,
            min=took.min / turns.round,
            median=took.median / turns.round,
            runs=took.runs * turns.round,
        )

    return time_replays


@contextlib.contextmanager
def time_limit(end: float) -> Iterator[None]:
    """Raise TimeoutError in the block once time.monotonic() is `end`; infinity for no limit.

    Between two Python instructions, so that a long call of a library ends first.
    """
    if math.isinf(end):
        yield
        return

    def over(*_: object) -> None:
        raise TimeoutError("over the time budget")

    if time.monotonic() >= end:
        over()
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, end - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- what figures are compared with -------------------------------------------------------------


def last_level_cache() -> int:
    """Give the bytes of the processor's last cache; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (folder / "size").read_text().strip() if (folder / "size").exists() else ""
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)


def copy_rate(device: torch.device, seconds: float = 1.0, size: int | None = None) -> float:
    """Give the bytes per second, read and written, of torch's copy of a large tensor: the best."""
    if size is None:
        size = COPY_BYTES if device.type == "cuda" else 4 * last_level_cache()
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    took = measure(lambda: target.copy_(source), seconds, least=5, device=device)
    return 2 * size / took.min


def product_rate(device: torch.device, seconds: float = 1.0, size: int = PRODUCT) -> float:
    """Give the FLOP per second of torch's product of two random bfloat16 matrices: the median.

    A GPU's clock falls as it works, so the best of many is not what it keeps up.
    """
    draw = Draw(device)
    a, b = (draw.normal(size, size, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    took = measure(lambda: torch.mm(a, b, out=out), seconds, least=5, warm_up=3, device=device)
    return 2 * size**3 / took.median
