"""The emulator sees a race exactly where there is one: random programs against vector clocks.

A program is a list of steps for three warps: in a step each thread reads, writes or atomically
changes one of a few cells, or does nothing; or a barrier of the block, of a warp or of two warps
stands. Which accesses are ordered is computed here once more, plainly, with a clock for every thread
(Mattern 1989, "Virtual time and global states of distributed systems").
"""

from __future__ import annotations

import ctypes
import random

import numpy as np

from tests.cuda.emulation import Emulator, Order

WARPS, LANES, CELLS = 3, 32, 16
THREADS = WARPS * LANES
NOTHING, READ, WRITE, ATOMIC, BLOCK, WARP, WAIT, ARRIVE = range(8)


def run(emulator: Emulator, program: np.ndarray) -> str | None:
    program = np.ascontiguousarray(program, dtype=np.int32)
    emulator.library.gemma2_emulator_clear_regions()
    emulator.library.gemma2_emulator_add_region(
        b"program",
        ctypes.c_void_p(program.ctypes.data),
        ctypes.c_int64(1),
        ctypes.c_int64(program.nbytes),
        ctypes.c_int64(0),
        0,
    )
    fault = emulator.library.gemma2_interpret(
        ctypes.c_void_p(program.ctypes.data), len(program), program.shape[1]
    )
    return None if fault is None else fault.decode()


def random_program(seed: int) -> np.ndarray:
    """[steps, threads] of instruction * 256 + argument; every barrier is reached by all it waits for."""
    r = random.Random(seed)
    program = np.zeros((r.randint(2, 12), THREADS), dtype=np.int32)
    owner = [r.randrange(THREADS) for _ in range(CELLS)]  # mostly one thread's or warp's, so that
    by_warp = r.random() < 0.5  # many programs have no race
    for number, step in enumerate(program):
        kind = r.random()
        if kind < 0.2:
            step[:] = BLOCK * 256
        elif kind < 0.35:
            for warp in range(WARPS):
                if r.random() < 0.6:
                    step[warp * LANES : (warp + 1) * LANES] = WARP * 256
        elif kind < 0.55:
            first, second = r.sample(range(WARPS), 2)
            step[first * LANES : (first + 1) * LANES] = r.choice([WAIT, ARRIVE]) * 256 + number
            step[second * LANES : (second + 1) * LANES] = WAIT * 256 + number
        else:
            for _ in range(r.randint(1, 6)):
                thread, cell = r.randrange(THREADS), r.randrange(CELLS)
                if r.random() < 0.7:
                    thread = owner[cell]
                    if by_warp:
                        thread = thread // LANES * LANES + r.randrange(LANES)
                step[thread] = r.choice([READ, READ, WRITE, ATOMIC]) * 256 + cell
    return program


def has_race(program: np.ndarray) -> bool:
    """Whether two accesses of a cell, one at least a write and not both atomic, are not ordered."""
    clock = [np.zeros(THREADS, dtype=int) for _ in range(THREADS)]
    for thread in range(THREADS):
        clock[thread][thread] = 1
    accesses: dict[int, list[tuple[int, int, int]]] = {}

    def meet(threads: list[int], waiting: list[int]) -> None:
        joined = np.max([clock[t] for t in threads], axis=0)
        for t in waiting:
            clock[t] = np.maximum(clock[t], joined)
        for t in threads:
            clock[t] = clock[t].copy()
            clock[t][t] += 1

    for step in program:
        codes, cells = step // 256, step % 256
        for thread in np.flatnonzero((codes == READ) | (codes == WRITE) | (codes == ATOMIC)):
            code, cell = int(codes[thread]), int(cells[thread])
            for other, then, time in accesses.get(cell, []):
                harmless = {code, then} == {READ} or {code, then} == {ATOMIC}
                if not harmless and clock[thread][other] < time:
                    return True
            accesses.setdefault(cell, []).append((int(thread), code, clock[thread][thread]))
        for warp in range(WARPS):
            lanes = list(range(warp * LANES, (warp + 1) * LANES))
            if codes[lanes[0]] == WARP:
                meet(lanes, lanes)
        named = np.flatnonzero((codes == WAIT) | (codes == ARRIVE)).tolist()
        if named:
            meet(named, [t for t in named if codes[t] == WAIT])
        if codes[0] == BLOCK:
            everyone = list(range(THREADS))
            meet(everyone, everyone)
    return False


def test_a_race_is_reported_exactly_where_accesses_are_not_ordered(emulator, tallies):
    for seed in range(400):
        program = random_program(seed)
        racy = has_race(program)
        tallies["random programs on the emulator"]["with a race" if racy else "without"] += 1
        for order in Order:
            emulator.configure(seed=seed, order=order)
            fault = run(emulator, program)
            assert (fault is not None) == racy, f"seed {seed}, {order.name}: {fault}"
            assert fault is None or ": race: " in fault


def test_reads_by_parts_of_a_warp_are_ordered_by_the_barrier_of_the_block(emulator):
    """Threads that have met more often have later epochs; a barrier orders what all of them did."""
    program = np.zeros((6, THREADS), dtype=np.int32)
    program[0, :LANES] = WARP * 256
    program[1, LANES : 2 * LANES] = WARP * 256
    program[2, ::5] = READ * 256 + 3
    program[3, :] = BLOCK * 256
    program[4, 40] = WRITE * 256 + 3
    emulator.configure()
    assert run(emulator, program) is None
    program[3, :] = 0
    assert ": race: " in (run(emulator, program) or "")
