"""How many blocks of a kernel a multiprocessor holds at a time, by the rules of the hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits per multiprocessor: CUDA C++ Programming Guide 13.0, section "Features and Technical
    Specifications", table "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared: int  # bytes for all its blocks
    registers: int = 65536

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_per_block(self) -> int:
        """The most that a launch may ask for."""
        return self.shared - RESERVED_SHARED


# By compute capability, as in sm_80.
MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared=164 * 1024),
    86: Multiprocessor(warps=48, blocks=16, shared=100 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared=228 * 1024),
    100: Multiprocessor(warps=64, blocks=32, shared=228 * 1024),
}

RESERVED_SHARED = 1024  # of every block, for the system
SHARED_UNIT = 128
REGISTER_UNIT = 256  # of a warp
PARTITIONS = 4  # of a multiprocessor: a warp's registers lie in one of them


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def resident_blocks(sm: Multiprocessor, threads: int, registers: int, shared: int) -> int:
    """Blocks at a time, of `threads` threads with `registers` each and `shared` bytes a block,
    static and dynamic; 0 if one alone does not fit."""
    warps = round_up(threads, 32) // 32
    of_a_warp = round_up(registers * 32, REGISTER_UNIT)
    of_a_block = round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    if of_a_warp * round_up(warps, PARTITIONS) > sm.registers or threads > 1024:
        return 0
    return min(
        sm.blocks,
        sm.warps // warps,
        sm.registers // PARTITIONS // of_a_warp * PARTITIONS // warps,
        sm.shared // of_a_block,
    )
