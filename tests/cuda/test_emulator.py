"""The emulator finds what is planted, names its place, and is silent where there is nothing."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

import pytest
import torch

from tests.cuda.emulation import SOURCE, Emulator, Landing, Order

PLANTED = (SOURCE / "planted.cu").read_text().splitlines()
READ, WRITE, BOTH = 0, 1, 2


@dataclass
class Operand:
    tensor: torch.Tensor
    access: int


def run(emulator: Emulator, name: str, bug: bool, *operands: Operand) -> str | None:
    """Launches a planted kernel; gives the fault."""
    library = emulator.library
    library.gemma2_emulator_clear_regions()
    for letter, operand in zip("abc", operands, strict=False):
        t = operand.tensor
        library.gemma2_emulator_add_region(
            f"{letter}".encode(),
            ctypes.c_void_p(t.data_ptr()),
            ctypes.c_int64(1),
            ctypes.c_int64(t.numel() * t.element_size()),
            ctypes.c_int64(0),
            operand.access,
        )
    pointers = [ctypes.c_void_p(o.tensor.data_ptr()) for o in operands]
    pointers += [ctypes.c_void_p(None)] * (3 - len(pointers))
    fault = library.gemma2_planted(name.encode(), *pointers, ctypes.c_bool(bug))
    if fault is None:
        fault = library.gemma2_emulator_check_written(name.encode())
    library.gemma2_emulator_clear_regions()
    return None if fault is None else fault.decode()


def lines_of_bug(name: str) -> list[str]:
    """The lines after the markers in the kernel's definition."""
    start = next(i for i, line in enumerate(PLANTED) if f"void {name}(" in line)
    end = PLANTED.index("}", start)
    markers = [i for i in range(start, end) if PLANTED[i].strip() == "// BUG"]
    return [f"tests/cuda/emulator/planted.cu:{i + 2}: " for i in markers]


def floats(n: int) -> torch.Tensor:
    """n random numbers, with room around them, so that no other operand is next to them."""
    return torch.randn(n + 512)[256 : 256 + n]


def simple(n: int = 64, m: int = 64):
    """x of n floats, out of m."""
    return lambda: (Operand(floats(n), READ), Operand(floats(m), WRITE))


# name: (operands, what the fault says)
CASES = {
    "reverse": (simple(), "race"),
    "exchange_between_warps": (simple(), "race|never written"),
    "stream": (simple(768, 768), "an asynchronous copy to it is under way"),
    "refill_too_early": (
        simple(768, 768),
        r"race: (a thread of warp \d+ read|thread \(\d+, 0, 0\) wrote)",
    ),
    "swizzled": (
        lambda: (
            Operand(torch.randint(0, 9000, (16, 64), dtype=torch.int16), READ),
            Operand(torch.empty(128, dtype=torch.int32), WRITE),
        ),
        "never written",
    ),
    "past_the_tile": (simple(), "out of bounds: the block has 0 bytes of dynamic shared memory"),
    "past_the_tensor": (
        simple(100, 100),
        r"a \+ \d+ bytes \(\d+ bytes behind its end\): out of bounds",
    ),
    "before_the_tensor": (simple(), r"a \+ -4 bytes \(before its start\): out of bounds"),
    "never_zeroed": (simple(), "never written"),
    "sum_of_blocks": (simple(128, 2), "race between blocks: another block of the launch writes"),
    "count_of_blocks": (
        lambda: (
            Operand(floats(1), READ),
            Operand(torch.zeros(1, dtype=torch.int32), BOTH),
        ),
        "race between blocks",
    ),
    "misaligned": (simple(68, 64), "misaligned"),
    "shuffle_inactive": (simple(32, 32), "reads lane 20, which is not in the mask 0x0000ffff"),
    "shuffle_after_the_end": (simple(32, 32), "lane 7|deadlock"),
    "barrier_in_a_branch": (simple(), "deadlock: "),
    "handover": (simple(128, 128), "race"),
    "writes_its_input": (simple(), "a is only read"),
    "layout_too_large": (simple(), "a layout of 512 bytes, but the launch asked for 256"),
}
SEEDS = range(8)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", CASES)
def test_a_planted_bug_is_found_and_its_line_named(emulator, name, order):
    operands, text = CASES[name]
    for seed in SEEDS:
        emulator.configure(seed=seed, order=order)
        fault = run(emulator, name, True, *operands())
        assert fault is not None, f"seed {seed}: nothing was found"
        assert re.search(text, fault), fault
        assert f"kernel {name}, block (" in fault
        if "deadlock" in fault:  # which names the lines where threads wait
            assert any(line.rstrip(": ") in fault for line in lines_of_bug(name)), fault
        else:
            assert re.search(r", thread \(\d+, 0, 0\), ", fault)
            assert any(line in fault for line in lines_of_bug(name)), fault


@pytest.mark.parametrize("landing", Landing)
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", CASES)
def test_without_the_bug_there_is_nothing_to_find(emulator, name, order, landing):
    operands, _ = CASES[name]
    for seed in SEEDS:
        emulator.configure(seed=seed, order=order, landing=landing)
        assert run(emulator, name, False, *operands()) is None
    emulator.configure()


def test_an_output_left_out_is_found(emulator):
    x = Operand(floats(64), READ)
    assert run(emulator, "output_left_out", False, x, Operand(torch.empty(64), WRITE)) is None
    fault = run(emulator, "output_left_out", True, x, Operand(torch.empty(64), WRITE))
    assert fault == "kernel output_left_out: b + 160 bytes has not been written"


def product(emulator, bug):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    d = torch.empty(16, 8)
    operands = Operand(a, READ), Operand(b, READ), Operand(d, WRITE)
    assert run(emulator, "product", bug, *operands) is None
    return d, (a.double() @ b.double().T)


def test_a_swapped_fragment_shows_in_the_product(emulator):
    d, exact = product(emulator, bug=False)
    torch.testing.assert_close(d.double(), exact, rtol=1e-6, atol=1e-5)
    d, exact = product(emulator, bug=True)
    wrong = (d.double() - exact).abs() > 0.05
    assert wrong.any(dim=1).all()  # in every row: a[1] belongs to the rows from 8 on


def test_results_are_those_of_the_hand_computed_tile(emulator):
    x, out = torch.arange(64.0), torch.empty(64)
    assert run(emulator, "reverse", False, Operand(x, READ), Operand(out, WRITE)) is None
    assert out.tolist() == x.flip(0).tolist()
    x, out = torch.arange(768.0), torch.empty(768)
    assert run(emulator, "stream", False, Operand(x, READ), Operand(out, WRITE)) is None
    assert torch.equal(out, x)


def test_bank_conflicts_of_a_plain_tile_are_counted_and_the_swizzle_has_none(emulator):
    x = torch.randint(0, 9000, (16, 64), dtype=torch.int16)
    with emulator.counting() as counters:
        out = torch.empty(128, dtype=torch.int32)
        assert run(emulator, "swizzled", False, Operand(x, READ), Operand(out, WRITE)) is None
    shared = counters["swizzled"]["shared"]
    assert shared["ldmatrix"]["conflicts"] == 0
    assert shared["ldmatrix"]["accesses"] == 1
    assert shared["ldmatrix"]["wavefronts"] == 4


def test_bytes_requests_and_sectors_are_counted(emulator):
    with emulator.counting() as counters:
        operands = Operand(floats(68), READ), Operand(torch.empty(64), WRITE)
        assert run(emulator, "misaligned", False, *operands) is None
    seen = counters["misaligned"]
    assert seen["global_read"]["bytes"] == seen["global_write"]["bytes"] == 256
    assert seen["global_read"]["requests"] == 1
    assert seen["region_read"] == {"a": 256}
    assert seen["region_written"] == {"b": 256}
    assert seen["instructions"]["load"] == seen["instructions"]["store"] == 16
    assert seen["blocks"] == 1
    assert seen["threads"] == 16


def test_the_same_seed_gives_the_same_fault_and_another_an_other(emulator):
    faults = []
    for seed in (*range(6), *range(6)):
        emulator.configure(seed=seed)
        faults.append(run(emulator, "reverse", True, *simple()()))
    # addresses of tensors do not show, so the texts can be compared
    assert faults[:6] == faults[6:]
    assert len(set(faults)) > 1


# name: what the launch says
REFUSED = {
    "threads_beyond_the_bounds": "a block of 96 threads: its __launch_bounds__ are 64",
    "threads_beyond_1024": "a block of 1025 threads: 1 to 1024 are possible",
    "shared_not_asked_for": "49168 bytes of dynamic shared memory: cudaFuncSetAttribute has allowed 49152",
    "shared_beyond_the_device": "invalid argument",
    "shared_beyond_a_small_device": "invalid argument",
    "static_beyond_48_kb": "49156 bytes in all: a kernel has at most 49152",
    "grid_x": "a grid of (2147483648, 1, 1)",
    "grid_y": "a grid of (1, 65536, 1): at most (2^31 - 1, 65535, 65535) is possible",
    "grid_z": "a grid of (1, 1, 65536)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_launch_that_no_gpu_takes_is_refused(emulator, monkeypatch, name):
    """And leaves no error behind for the next one."""
    if "small_device" in name:
        monkeypatch.setenv("GEMMA2_EMULATED_SHARED_KB", "100")  # as compute capability 8.6 has
    if name == "threads_beyond_1024":
        a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
        operands = Operand(a, READ), Operand(b, READ), Operand(torch.empty(16, 8), WRITE)
    else:
        operands = Operand(floats(64), READ), Operand(floats(64), WRITE)
    fault = run(emulator, name, True, *operands)
    assert fault is not None
    assert REFUSED[name] in fault
    assert run(emulator, name, False, *operands) is None


def test_an_unknown_planted_kernel_is_no_success(emulator):
    assert run(emulator, "no such kernel", False) == "there is no such planted kernel"
