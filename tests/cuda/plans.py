"""What each CUDA kernel is planned to use: its budget of registers, shared memory and warps.

Where the comment at the top of the kernel's file names a number, it is one of these. A kernel may
use less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

LOAD_128 = r"LDG\.E\b.*\.128\b"  # 16 bytes of global memory at a time
LOAD_64 = r"LDG\.E\b.*\.64\b"
STORE_128 = r"STG\.E\b.*\.128\b"
STORE_64 = r"STG\.E\b.*\.64\b"
COPY_128 = r"LDGSTS\.E\b.*\.128\b"  # the same into shared memory, without waiting
TENSOR_CORES = r"HMMA\.16816\.F32\b"
LOAD_MATRIX = r"LDSM\.16\.M88\.4$"
LOAD_TRANSPOSED = r"LDSM\.16\.MT88\.4$"
# 4 bytes of global memory or fewer at a time.
NARROW = r"(LDG|STG)\.E(\.NA|\.CONSTANT|\.[US](8|16))*$"

FLOAT64 = r"D(?!EPBAR)[A-Z]+\b|.*\bF64\b"  # DEPBAR waits for copies
PRINTF = r"STL"  # the arguments of the message before a stop


@dataclass(frozen=True)
class Plan:
    kernels: str  # which: a pattern of names as the table has them, `rms_norm<*, 2>`
    threads: int  # of __launch_bounds__
    registers: int  # of a thread, at most, on every architecture
    warps: int  # resident on a multiprocessor, at least; or as many as it holds of such blocks
    launched: int = 0  # threads of the blocks that are counted, if not those of the bounds
    static_shared: int = 0  # bytes, at most
    dynamic_shared: int = 0  # bytes that the launch asks for, at most
    stack: int = 0  # bytes a thread, at most
    expects: tuple[str, ...] = ()  # patterns of instructions, each of which must occur
    forbids: tuple[str, ...] = ()  # of those that must not, besides what no kernel should have
    allows: tuple[str, ...] = ()  # of those that no kernel should have, but this one may


def from_to(plan: Plan) -> tuple[Plan, ...]:
    """For the instantiations <From, To, elements that are moved at a time> of an operator: 16 bytes
    of the wider type, or one element."""
    name = plan.kernels
    pack = replace(plan, forbids=(NARROW,))
    return (
        replace(pack, kernels=f"{name}<f32, *16, 4>", expects=(LOAD_128, STORE_64)),
        replace(pack, kernels=f"{name}<*16, f32, 4>", expects=(LOAD_64, STORE_128)),
        replace(pack, kernels=f"{name}<*, [48]>", expects=(LOAD_128, STORE_128)),
        replace(plan, kernels=f"{name}<*, 1>"),
    )


def one_type(plan: Plan, tail: bool = False) -> tuple[Plan, ...]:
    """The same of <T, elements that are moved at a time>. `tail`: packs may be followed by less."""
    pack = replace(plan, expects=(LOAD_128, STORE_128), forbids=() if tail else (NARROW,))
    return (
        replace(pack, kernels=f"{plan.kernels}<*, [48]>"),
        replace(plan, kernels=f"{plan.kernels}<*, 1>"),
    )


def norms(plan: Plan) -> tuple[Plan, ...]:
    """`plan` for two packs a thread, which hidden sizes of 2304 to 4608 take: 160 threads and more.
    Up to 128 packs in a row a thread takes one, from 1025 on four."""
    name = plan.kernels
    wide = replace(plan, expects=(LOAD_128, STORE_128), forbids=(NARROW,))
    mixed = replace(plan, expects=(LOAD_128, STORE_64), forbids=(NARROW,))
    return tuple(
        replace(p, kernels=f"{name}<{types}, {packs}>", **sizes)
        for types, p in (("f32, *16", mixed), ("*", wide))
        for packs, sizes in FEWER_AND_MORE_PACKS[name].items()
    )


FEWER_AND_MORE_PACKS: dict[str, dict[int, dict[str, int]]] = {
    "rms_norm": {
        1: {"registers": 32, "warps": 64, "launched": 128},
        2: {},
        4: {"registers": 80, "warps": 16, "launched": 512},
    },
    "add_rms_norm": {
        1: {"registers": 40, "warps": 48, "launched": 128},
        2: {},
        4: {"registers": 128, "warps": 16, "launched": 512},
    },
}

_piece = Plan(
    "sample *", threads=256, registers=64, warps=32, static_shared=1792, stack=32,
    expects=(LOAD_128,), allows=(PRINTF,),
)  # fmt: skip

# The first that fits counts.
# Two products and their operands: keys by rows, values transposed.
_products = (COPY_128, TENSOR_CORES, LOAD_MATRIX, LOAD_TRANSPOSED)
_few = (COPY_128, LOAD_MATRIX, TENSOR_CORES)
# The fewest warps are sm_86's: its shared memory holds one block at head_dim 256 and 128, two at 64.
_decode = Plan(
    "attention_decode split<*, 256, *>", threads=128, registers=168, warps=4, dynamic_shared=76800,
    expects=_products,
)  # fmt: skip
_prefill = Plan(
    "attention_prefill<*, 256, *>", threads=128, registers=255, warps=4, dynamic_shared=98944,
    expects=_products,
)  # fmt: skip

PLANS = (
    *from_to(
        Plan(
            "embed", threads=512, launched=160, registers=32, warps=60, stack=32, allows=(PRINTF,)
        )
    ),
    *norms(
        Plan("rms_norm", threads=512, launched=160, registers=40, warps=45, static_shared=128),
    ),
    *norms(
        Plan("add_rms_norm", threads=512, launched=160, registers=64, warps=30, static_shared=256),
    ),
    Plan("rms_norm_any", threads=512, registers=40, warps=48, static_shared=128),
    Plan("add_rms_norm_any", threads=512, registers=48, warps=32, static_shared=256),
    *from_to(Plan("rope", threads=256, registers=80, warps=24)),
    *from_to(Plan("cache_write", threads=256, registers=64, warps=32)),
    *one_type(Plan("geglu", threads=128, registers=40, warps=48)),
    # The last elements are moved one by one.
    *one_type(Plan("softcap", threads=256, registers=40, warps=64), tail=True),
    _decode,
    replace(_decode, kernels="attention_decode split<*, 128, *>", dynamic_shared=74752),
    replace(
        _decode, kernels="attention_decode split<*, 64, *>", registers=128, warps=8,
        dynamic_shared=39936,
    ),
    Plan(
        "attention_decode combine<*>", threads=128, registers=56, warps=36, static_shared=2944,
        expects=(LOAD_128,),
    ),
    Plan("attention_merge", threads=64, registers=96, warps=20, expects=(LOAD_128,)),
    _prefill,
    replace(_prefill, kernels="attention_prefill<*, 128, *>", warps=8, dynamic_shared=49792),
    replace(
        _prefill, kernels="attention_prefill<*, 64, *>", registers=168, warps=12,
        dynamic_shared=25216,
    ),
    Plan(
        "linear_few<*, 1>", threads=288, registers=88, warps=9, dynamic_shared=82944,
        expects=_few,
    ),
    Plan(
        "linear_few<*, 2>", threads=288, registers=128, warps=9, dynamic_shared=92160,
        expects=_few,
    ),
    Plan(
        "linear_tile<*, true>", threads=128, registers=216, warps=4, dynamic_shared=73728,
        expects=(COPY_128, LOAD_MATRIX, TENSOR_CORES, STORE_128),
    ),
    # Of what is not aligned.
    Plan(
        "linear_tile<*, false>", threads=128, registers=216, warps=4, dynamic_shared=73728,
        expects=(TENSOR_CORES,),
    ),
    Plan("linear_f32", threads=256, registers=80, warps=24, static_shared=18432),
    Plan("attention_any<*>", threads=256, registers=128, warps=8, dynamic_shared=70144),
    Plan("attention copy", threads=256, registers=32, warps=64),
    replace(_piece, kernels="sample best<*>"),
    Plan("sample best_row", threads=64, registers=32, warps=64, static_shared=1280),
    replace(_piece, kernels="sample top_k<*>", static_shared=6400),
    # Sums of weights are compared as float64.
    replace(_piece, kernels="sample sum<*>", allows=(PRINTF, FLOAT64)),
    replace(_piece, kernels="sample collect<*>", registers=80, warps=24, allows=(PRINTF, FLOAT64)),
    Plan(
        "sample choose", threads=1024, registers=64, warps=32, dynamic_shared=71952,
        allows=(FLOAT64,),
    ),
    # At the longest row, of 4096 columns; sm_86 holds two.
    replace(
        _piece, kernels="sample row<*>", registers=80, warps=16,
        static_shared=0, dynamic_shared=6416 + 4096 * 8, allows=(PRINTF, FLOAT64),
    ),
)  # fmt: skip


def plan_of(kernel: str) -> Plan | None:
    return next((plan for plan in PLANS if fnmatchcase(kernel, plan.kernels)), None)
