"""A model on paper of the attention kernels, for predict.py; docs/kernels.md explains it."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from benchmarks.gpus import KB, SIZES, Assumed, Device, Result, joined, streamed

# ---- A tile of attention's prefill ----------------------------------------------------------------

# In clocks: ldmatrix of four 8x8 matrices moves 512 bytes. Instructions beside products, ldmatrix
# and special functions, counted in the machine code of sm_90 (nvcc 13.0, head_dim 256): of a score
# 5 of float32, 0.5 conversions, 1.2 others; of a product 0.9; of a tile 150. A copy of 16 bytes
# takes 3, and 40 more each tile of K or V.
BARRIER = 40  # assumed
PHASE = 60  # first ldmatrix to first product, last product to first use: assumed


@dataclass(frozen=True)
class Tile:
    """Rows x 64 keys, and how warps share them. The default is attention_prefill.cu's."""

    dim: int = 256
    rows: int = 64
    keys: int = 64
    warp_rows: int = 16  # that an ldmatrix of K or V serves
    sharing: int = 1  # warps with the same rows: each has its part of the keys in S, of D in O
    kept: bool = False  # Q's fragments stay in registers
    special: float = 3.0  # functions a score
    float_ops: float = 5.0
    copy_ops: float = 3.0
    limit: int = 2  # blocks on an SM, by registers
    pipelined: bool = False  # the next S is multiplied while these scores are exponentiated

    @property
    def warps(self) -> int:
        return self.rows // self.warp_rows * self.sharing

    @property
    def shared(self) -> int:
        exchanged = 2 * self.rows * self.keys if self.sharing > 1 else 0
        return (
            2 * self.dim * (self.rows + 2 * self.keys) + 8 * self.rows + 32 * self.warps + exchanged
        )

    def resident(self, device: Device) -> int:
        return min(self.limit, device.shared // (self.shared + KB))

    def products(self, keys: int) -> tuple[int, int]:
        """mma_16x8x16 of a warp: for S, for O."""
        each = self.warp_rows // 16 * self.dim // 16 * keys // 8 // self.sharing
        return each, each

    def loads(self, keys: int) -> tuple[int, int]:
        """ldmatrix of a warp: for S, for O."""
        q = 0 if self.kept else self.dim // 16 * self.warp_rows // 16
        each = keys // 16 * self.dim // 16 // self.sharing
        p = self.warp_rows // 16 * keys // 16 if self.sharing > 1 else 0
        return each + q, each + p

    @functools.lru_cache(maxsize=256)  # noqa: B019 - frozen and few
    def clocks(self, device: Device, assumed: Assumed, keys: int = 64) -> Clocks:
        """What a tile takes of an SM of which the slowest warp sees `keys` keys, in steps of 16."""
        beside = self.warps / device.issued  # warps of a scheduler
        mma = 4096 * device.issued / device.products
        s_mma, o_mma = (n * mma * beside for n in self.products(keys))
        s_load, o_load = (n * self.warps * 512 / device.shared_bytes for n in self.loads(keys))
        copied = 2 * self.keys * 2 * self.dim  # bytes of K and V
        exchanged = 2 * self.rows * self.keys if self.sharing > 1 else 0
        scores = self.rows * self.keys
        special = scores * self.special / device.special
        floats = scores * self.float_ops / device.fma
        softmax = scores / 32 * (self.special + self.float_ops + 1.7) / device.issued
        copies = copied / 16 / (32 * self.warps) * self.copy_ops + 80  # instructions of a warp
        mmas, loads = sum(self.products(keys)), sum(self.loads(keys))
        alone = copies + 150
        parts = {
            "products": s_mma + o_mma,
            "shared memory": s_load + o_load + (copied + exchanged) / device.shared_bytes,
            "special functions": special,
            "issue": beside * (1.9 * mmas + loads + alone) + softmax,
        }
        waiting = (
            max(s_mma, s_load)
            + max(o_mma, o_load)
            + assumed.exposed * mmas / 32
            + (0 if self.pipelined else max(special, floats, softmax))
            + alone / assumed.ipc
            + (6 if self.sharing > 1 else 4) * BARRIER
            + 3 * PHASE
        )
        return Clocks(parts, waiting, assumed)


@dataclass(frozen=True)
class Clocks:
    parts: dict[str, float]  # busy, by unit
    waiting: float  # of one block alone, phase after phase
    assumed: Assumed

    def among(self, blocks: int) -> float:
        """Of a tile, where so many blocks take turns on an SM."""
        both = [max(self.parts.values()), self.waiting / blocks]
        return joined(both, self.assumed.overlap) / self.assumed.prefill


def tile_of(dim: int) -> Tile:
    return Tile(dim, kept=dim <= 128, limit=3 if dim == 64 else 2)


# ---- Prefill: which tiles ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """A case of benchmarks/attention.py: the queries are the last positions of the keys."""

    q_heads: int
    kv_heads: int
    dim: int
    batch: int
    queries: int
    keys: int
    window: int
    dtype: str
    deterministic: bool = False

    @classmethod
    def of(cls, case: dict[str, Any]) -> Attention:
        names = {f.name for f in dataclasses.fields(cls)} & set(case)
        q_heads, kv_heads, dim = case["heads"]
        return cls(q_heads, kv_heads, dim, **{name: case[name] for name in names})

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def rows(self) -> int:  # of a key/value head
        return self.queries * self.group

    def seen(self, row: int) -> tuple[int, int]:
        """The keys [lo, hi) of a row."""
        position = self.keys - self.queries + row // self.group
        return max(0, position - self.window + 1) if self.window else 0, position + 1

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all query heads."""
        ranges = (self.seen(row) for row in range(0, self.rows, self.group))
        return self.batch * self.q_heads * sum(hi - lo for lo, hi in ranges)

    @property
    def moved(self) -> int:
        """Bytes of q, k, v and out."""
        rows = self.q_heads * self.queries + self.kv_heads * self.keys
        return 2 * self.batch * rows * self.dim * SIZES[self.dtype]

    @property
    def kind(self) -> str:
        """Which kernel: csrc/cuda/attention.cu."""
        if self.dtype == "float32":
            return "any"
        return "decode" if self.rows <= 16 and not self.deterministic else "prefill"


def blocks_of(
    a: Attention, rows: int = 64, keys: int = 64
) -> Iterator[tuple[int, list[list[int]]]]:
    """Of each block of a key/value head: tiles that all its rows see whole, and of the other ones
    the steps of 16 keys that each warp multiplies."""
    for first in range(0, a.rows, rows):
        last = min(first + rows, a.rows) - 1
        lo, hi = a.seen(first)[0], a.seen(last)[1]
        full_lo, full_hi = a.seen(last)[0], a.seen(first)[1]
        if last < first + rows - 1:
            full_hi = 0  # rows that are not there see nothing
        full = 0
        partial = []
        for start in range(lo // keys * keys, hi, keys):
            if start >= full_lo and start + keys <= full_hi:
                full += 1
                continue
            steps = []
            for row in range(first, first + rows, 16):
                if row > last:
                    steps.append(0)
                    continue
                begin = max(a.seen(row)[0] - start, 0)
                end = min(a.seen(min(row + 15, last))[1] - start, keys)
                steps.append(max(0, ceil(end / 16) - begin // 16) if begin < end else 0)
            partial.append(steps)
        yield full, partial


def prefill_counts(case: dict[str, Any]) -> dict[str, int]:
    """Instructions of attention_prefill, as the emulator counts them: products and ldmatrix a warp,
    copies and exp2 a thread. Special functions are exp2 and half as many reciprocals."""
    a = Attention.of(case)
    tile = tile_of(a.dim)
    mma, loads, q_loads = sum(tile.products(16)), a.dim // 8, tile.loads(0)[0]
    counts = dict.fromkeys(("mma_16x8x16", "ldmatrix", "copy_async", "exp2_approx"), 0)
    for full, partial in blocks_of(a):
        for times, steps in ((full, [4] * 4), *((1, p) for p in partial)):
            working = sum(s > 0 for s in steps)
            counts["mma_16x8x16"] += times * sum(steps) * mma
            counts["ldmatrix"] += times * (sum(steps) * loads + working * q_loads)
            counts["exp2_approx"] += times * working * 2 * 16 * 64
        if tile.kept:
            counts["ldmatrix"] += 4 * a.dim // 16
        counts["copy_async"] += (2 * 64 * (full + len(partial)) + 64) * a.dim // 8
    return {name: n * a.kv_heads * a.batch for name, n in counts.items()}


def makespan(works: Sequence[float], sms: int, slots: int, slowdown: Sequence[float]) -> float:
    """When the last block ends. Blocks of `works` clocks alone start in order wherever a slot is
    free; n on one SM take slowdown[n] times as long each."""
    waiting = iter(works)
    running: list[list[float]] = [[] for _ in range(sms)]
    for _ in range(slots):
        for sm in range(sms):
            running[sm] += [work for work in (next(waiting, None),) if work is not None]

    def next_end(now: float, sm: int) -> tuple[float, int, float]:
        left = min(running[sm])
        return now + left * slowdown[len(running[sm])], sm, left

    ends = [next_end(0.0, sm) for sm in range(sms) if running[sm]]
    heapq.heapify(ends)
    now = 0.0
    while ends:
        now, sm, done = ends[0]
        running[sm] = [work - done for work in running[sm] if work > done]
        while len(running[sm]) < slots and (work := next(waiting, None)) is not None:
            running[sm].append(work)
        if running[sm]:
            heapq.heapreplace(ends, next_end(now, sm))
        else:
            heapq.heappop(ends)
    return now


# Of deterministic attention: its sums are closed every so many keys, and what is closed goes to the
# second-level cache and back, so many bytes a clock and SM: half of what moves there at most, assumed.
SUM_KEYS = 512
SUM_BYTES = 32


def sums_side_by_side(blocks: int, rows: int, keys: int, resident: int) -> int:
    """As csrc/common/attention_plan.h has it."""
    sums = (keys + SUM_KEYS - 2) // SUM_KEYS + 1 if keys > 1 else 1
    in_turn = -(-blocks // resident) * (-(-keys // 64) + 2)
    apart = -(-blocks * sums // resident) * (SUM_KEYS // 64 + 2 + rows // 16) + 2
    return sums if sums > 1 and apart < in_turn else 1


def parts_of(a: Attention, tile: Tile, device: Device) -> int:
    """In how many blocks the keys of one are summed: attention_prefill.cu."""
    if not a.deterministic:
        return 1
    queries = min(a.queries, -(-(tile.rows - 1) // a.group) + 1)
    keys = min(a.keys, a.window + queries - 1) if a.window else a.keys
    blocks = ceil(a.rows / tile.rows) * a.kv_heads * a.batch
    resident = tile.resident(device) * device.sms
    return sums_side_by_side(blocks, min(a.rows, tile.rows), keys, resident)


def side_by_side(
    blocks: Iterator[tuple[int, list[list[int]]]],
) -> Iterator[tuple[int, list[list[int]]]]:
    """Blocks cut each SUM_KEYS: where the first one begins is not told apart."""
    each = SUM_KEYS // 64
    for full, partial in blocks:
        yield from [(each, [])] * (full // each)
        rest = full % each
        yield rest, partial[: each - rest]
        for first in range(each - rest, len(partial), each):
            yield 0, partial[first : first + each]


def prefill(a: Attention, device: Device, assumed: Assumed) -> Result:
    tile = tile_of(a.dim)
    slots = tile.resident(device)
    parts_a_block = parts_of(a, tile, device)
    busy: dict[str, float] = {}
    works = []
    blocks = side_by_side(blocks_of(a)) if parts_a_block > 1 else blocks_of(a)
    for full, partial in blocks:
        work = 2500 + assumed.trips * device.trip  # what it sees, the first tile's way, the result
        if parts_a_block > 1:
            closed = min(a.rows, tile.rows) * (4 * a.dim + 16)
        else:  # a total is written and read, with the sums of a row in each of its four threads
            closed = 2 * ceil((full + len(partial)) * 64 / SUM_KEYS) * tile.rows * (4 * a.dim + 64)
        if a.deterministic:
            work += closed / SUM_BYTES
            busy["sums"] = busy.get("sums", 0.0) + closed / SUM_BYTES
        # The block waits for its slowest warp.
        for times, keys in ((full, 64), *((1, 16 * max(steps)) for steps in partial if max(steps))):
            clocks = tile.clocks(device, assumed, keys)
            work += times * clocks.among(1)
            for name, part in {**clocks.parts, "waiting": clocks.waiting / slots}.items():
                busy[name] = busy.get(name, 0.0) + times * part
        works.append(work)
    heads = a.kv_heads * a.batch
    whole = tile.clocks(device, assumed)
    slowdown = [n * whole.among(n) / whole.among(1) if n else 1.0 for n in range(slots + 1)]
    # Late queries, which see the most, first.
    order = [work for work in reversed(works) for _ in range(heads)]
    seconds = makespan(order, device.sms, slots, slowdown) / device.clock
    rate = device.sms * device.clock
    parts = {name: clocks * heads / rate for name, clocks in busy.items()}
    parts["bytes"] = a.moved / (device.bandwidth * device.reach)
    parts["launch"] = assumed.launch
    seconds = max(seconds, parts["bytes"]) + assumed.launch
    if parts_a_block > 1:
        kept = a.batch * a.q_heads * a.queries * parts_a_block * (4 * a.dim + 16)
        moved = kept if kept > device.l2 else 0  # else they are read out of the second-level cache
        merge = streamed(moved, device, assumed, trips=ceil(parts_a_block / 8))
        parts["launch"] += merge.parts["launch"]
        seconds += merge.seconds
    return Result(seconds, parts)


# ---- Decode, and what tensor cores do not take -------------------------------------------------------


def decode_splits(sequences: int, keys: int, tile: int, resident: int) -> int:
    """As csrc/common/attention_plan.h has it."""
    if sequences <= 0:
        return 1
    tiles = max(1, ceil(keys / tile))
    most = min(tiles, 128)
    found = (-(-sequences // resident) * (tiles + 2), 1)
    for fill in range(1, 5):
        splits = min(fill * resident // sequences, most)
        if splits <= 1:
            continue
        each = -(-tiles // splits)
        splits = -(-tiles // each)
        found = min(found, (-(-sequences * splits // resident) * (each + 2) + 2, splits))
    return found[1]


def decode(a: Attention, device: Device, assumed: Assumed) -> Result:
    seen = min(a.keys, a.window + a.queries - 1) if a.window else a.keys
    sequences = a.batch * a.kv_heads
    keys = 32 if a.dim == 256 else 64
    block = {64: 39936, 128: 74752, 256: 76800}[a.dim] + KB
    resident = device.sms * max(1, min(4 if a.dim == 64 else 3, device.shared // block))
    splits = decode_splits(sequences, seen, keys, resident)
    size = SIZES[a.dtype]
    moved = sequences * (2 * seen * a.dim + 2 * a.rows * a.dim) * size
    if splits == 1:
        return streamed(moved, device, assumed, trips=2)
    partial = 2 * sequences * splits * a.rows * 4 * (a.dim + 4)
    # Partial sums are read out of the second-level cache if they fit.
    first = streamed(moved, device, assumed, trips=2)
    second = streamed(partial if partial > device.l2 else 0, device, assumed, trips=1)
    parts = {name: first.parts[name] + second.parts[name] for name in first.parts}
    return Result(first.seconds + second.seconds, parts)


def any_attention(a: Attention, device: Device, assumed: Assumed) -> Result:
    """attention_any.cu: 32 rows x 32 keys, 8 warps; wavefronts counted by hand."""
    tiles = sum(full + len(partial) for full, partial in blocks_of(a, 32, 32))
    four = 8 * a.dim // 4 * 8  # S: of 8 warps, for 4 columns: K 4, Q 1 of each of 4 rows
    pieces, bytes_a_lane = (1, 8) if a.dim == 64 else (a.dim // 128, 16)
    values = 8 * 8 * (4 + pieces * 4 * bytes_a_lane // 4)  # O: of 8 warps, 8 times 4 keys
    shared = four + values + 2 * 32 * 4 * a.dim / device.shared_bytes
    fma = 2 * 32 * 32 * a.dim / device.fma
    clocks = joined([shared, fma], assumed.overlap) / assumed.prefill
    times = tiles * a.kv_heads * a.batch / (device.sms * device.clock)
    parts = {"shared memory": shared * times, "products": fma * times, "launch": assumed.launch}
    blocks = ceil(a.rows / 32) * a.kv_heads * a.batch
    # Of few blocks, one's time.
    longest = max(full + len(partial) for full, partial in blocks_of(a, 32, 32)) * clocks
    seconds = max(clocks * times, longest / device.clock if blocks < 2 * device.sms else 0.0)
    parts["bytes"] = a.moved / (device.bandwidth * device.reach)
    return Result(max(seconds, parts["bytes"]) + assumed.launch, parts)


def attention(case: dict[str, Any], device: Device, assumed: Assumed) -> Result | None:
    a = Attention.of(case)
    if a.dim not in (64, 128, 256):
        return None
    return {"any": any_attention, "decode": decode, "prefill": prefill}[a.kind](a, device, assumed)
