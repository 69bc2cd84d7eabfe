"""GPUs in figures, and what is assumed beside them: for the model on paper in predict.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

KB = 1024
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """A GPU in the figures that the model needs. Rates are per clock and multiprocessor (SM)."""

    words: tuple[str, ...]  # all in the name that torch gives
    sms: int
    clock: float  # Hz
    bandwidth: float  # bytes per second, by the data sheet
    reach: float  # what a copy gets of it
    l2: int  # bytes
    trip: float  # clocks from a load to its value, out of memory
    products: float  # FLOP of mma.sync, bfloat16 with float32 sums
    library: float  # FLOP per second of cuBLAS in large products
    fma: int  # lanes of float32
    shared: int  # bytes of shared memory for all blocks of an SM
    special: int = 16  # special functions; CUDA C++ Programming Guide, "Arithmetic Instructions":
    # 16 for 8.0, 8.9 and 9.0. There too: fma 64, 128, 128; conversions to 16 bits 64.
    shared_bytes: int = 128  # of shared memory: 32 banks of 4 bytes (ibid., "Shared Memory")
    issued: int = 4  # warp instructions: a scheduler each of 4 partitions


# `trip`: arXiv 2402.13499, table of latencies: 466 (A100), 479 (H100), 541 (RTX 4090).
A100 = Device(
    ("A100", "80GB"),
    sms=108, clock=1.41e9, l2=40 << 20, shared=164 * KB,  # A100 white paper
    bandwidth=2.039e12,  # data sheet, SXM 80 GB
    reach=0.85,  # of a plain copy: gpt-fast's post (pytorch.org, 2023-11)
    trip=466, fma=64,
    products=2048,  # 312 TFLOP/s (data sheet) / sms / clock; mma.sync reaches it: arXiv 2206.02874
    library=0.85 * 312e12,  # assumed
)  # fmt: skip
H100 = Device(
    ("H100", "HBM3"),
    sms=132, clock=1.83e9, l2=50 << 20, shared=228 * KB,  # H100 white paper; clock: that of 989 TFLOP/s
    bandwidth=3.35e12,  # data sheet, SXM
    reach=0.9,  # assumed to be the H200's
    trip=479, fma=128,
    # mma.sync gets 62 to 65% of the 4096 that wgmma has: arXiv 2402.13499 (H800)
    products=0.62 * 4096,
    library=0.79 * 989e12,  # H200: 770 to 800 TFLOP/s at 8192^3, measured
)  # fmt: skip
H200 = dataclasses.replace(
    H100,
    words=("H200",),
    bandwidth=4.8e12,  # data sheet
    reach=0.9,  # a copy's 4.3 TB/s, measured
)
RTX_4090 = Device(
    ("RTX 4090",),
    sms=128, clock=2.52e9, l2=72 << 20, shared=100 * KB, bandwidth=1.008e12,  # Ada white paper
    reach=0.9,  # assumed
    trip=541, fma=128,
    products=512,  # 165.2 TFLOP/s with float32 sums (Ada white paper) / sms / clock
    library=0.92 * 165.2e12,  # assumed
)  # fmt: skip
DEVICES = {"A100 80 GB": A100, "H100": H100, "H200": H200, "RTX 4090": RTX_4090}


def device_of(name: str) -> Device | None:
    return next((d for d in DEVICES.values() if all(word in name for word in d.words)), None)


@dataclass(frozen=True)
class Assumed:
    """What no data sheet says."""

    launch: float  # seconds from a kernel's end to the next one's first instruction, in a graph
    trips: float  # of a load's latency, that a kernel cannot hide at its start and end
    exposed: float  # clocks that 32 products of a warp wait for their operands, or a load in sum
    ipc: float  # instructions a clock of a warp that has its scheduler for itself, in address arithmetic
    overlap: float  # exponent of the norm that joins what can overlap: infinite = perfectly
    prefill: float  # share of what then remains; FlashAttention-2 on H100 has 0.86 (PUBLISHED)
    streams: float  # share of a copy's bandwidth


LIKELY = Assumed(1.0e-6, 2.0, 40, 0.50, 4.0, 0.86, 1.00)
BETTER = Assumed(0.6e-6, 1.0, 15, 0.70, 6.0, 1.00, 1.05)
WORSE = Assumed(2.0e-6, 3.0, 90, 0.35, 3.0, 0.75, 0.85)


def joined(parts: list[float], exponent: float) -> float:
    """Time of parts that overlap: their maximum, and more where they are alike."""
    most = max(parts)
    return 0.0 if most == 0 else most * sum((p / most) ** exponent for p in parts) ** (1 / exponent)


@dataclass(frozen=True)
class Result:
    seconds: float
    parts: dict[str, float]  # of each resource alone

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def streamed(
    moved: float,
    device: Device,
    assumed: Assumed,
    launches: int = 1,
    trips: int = 1,
    issued: float = 0.0,
    products: float = 0.0,
) -> Result:
    """A kernel that memory bounds: its bytes after its launches and `trips` loads in a row each, or
    `issued` thread instructions or seconds of `products` if they take longer."""
    start = launches * (assumed.launch + (trips - 1 + assumed.trips) * device.trip / device.clock)
    parts = {
        "bytes": moved / (device.bandwidth * min(0.97, device.reach * assumed.streams)),
        "issue": issued / (32 * device.issued * device.sms * device.clock),
        "products": products,
        "launch": start,
    }
    return Result(start + max(parts["bytes"], parts["issue"], products), parts)
