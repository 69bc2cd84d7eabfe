"""Which benchmarks a GPU day runs, in which order, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BENCH", "COMPILED", "FIRST_BUILD", "LATER_BUILD", "LEFT_OUT", "STARTING", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """A process of `make gpu PART=bench`."""

    name: str
    only: str  # what its cases' text contains
    seconds: float  # at most, starting (10 s) included

    def __str__(self) -> str:
        return f"benchmark {self.name}" + (f" ({self.only})" if self.only else "")


# What counts most comes first, since a run may be cut off; a process takes what it needs, and no more
# than it has here. Up to the 9B model all of it fits into a part that must build first (FIRST_BUILD),
# the rest into one that finds what a part before has built. Estimated at worst, before the first run on
# a GPU: 2 s a case of attention and 10 s to compile FlexAttention at each of 12 shapes, 0.6 s a product,
# 5 s a case of the model and 50 s to compile transformers', 3 s a case of what moves bytes, its
# compiled peer included.
BENCH = (
    Benchmark("attention", "kind=prefill heads=(8, 4, 256)", 70),
    Benchmark("attention", "kind=decode", 80),
    Benchmark("linear", "", 38),
    Benchmark("model", "size=2b", 90),
    Benchmark("attention", "kind=prefill heads=(32, 16, 128)", 35),
    Benchmark("attention", "kind=prefill heads=(16, 8, 256)", 22),
    Benchmark("model", "size=9b", 48),
    Benchmark("rms_norm", "hidden=2304 dtype=bfloat16", 20),
    Benchmark("rope", "model=2b", 25),
    Benchmark("sample", "rows=1 dtype=bfloat16", 25),
    Benchmark("cache_write", "heads=4 dim=256", 20),
    Benchmark("geglu", "width=9216 dtype=bfloat16", 15),
    Benchmark("embed", "hidden=2304 dtype=bfloat16", 15),
    Benchmark("softcap", "dtype=bfloat16", 15),
)
LEFT_OUT = ("assisted",)  # how many calls drafts save depends on the text and not on the device
FIRST_BUILD, LATER_BUILD = 145.0, 15.0  # seconds
STARTING = 10.0  # seconds of a process, torch's import and the first rates
COMPILED = ("compile", "flex")  # peers
