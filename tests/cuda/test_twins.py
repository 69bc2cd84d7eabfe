"""The instructions behind csrc/cuda/ptx.h do what the PTX manual says: on a GPU, and in their twins
under the emulator.

GEMMA2_CUDA_TWINS names a library that nvcc built from twin_kernels.cu; GEMMA2_EMULATED_TWINS one for
the emulator, if it is not that of `make emulator`. Both must pass the same tests, so that whatever
the emulated kernels show of layouts, rounding and special values holds on the device; what the
manual leaves open is not asserted.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda import fragments
from tests.cuda.emulation import LIBRARY, SOURCE, Emulator
from tests.cuda.fragments import from_lanes, to_lanes

READ, WRITE, READ_WRITE = 0, 1, 2
ALL_LANES = 0xFFFFFFFF


class TwinError(RuntimeError):
    """A wrapper's kernel has failed."""


class Twins:
    """The kernels of one library, called with tensors on the host that are copied in and out."""

    def __init__(self, path: str, device: str) -> None:
        self.library = ctypes.CDLL(path)
        self.device = device
        self.emulated = device == "cpu"
        run = self.library.gemma2_twin
        run.restype = ctypes.c_char_p
        run.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_void_p]
        if self.emulated:
            add = self.library.gemma2_emulator_add_region
            add.restype = None
            int64 = ctypes.c_int64
            add.argtypes = [ctypes.c_char_p, ctypes.c_void_p, int64, int64, int64, ctypes.c_int]
            self.library.gemma2_emulator_clear_regions.restype = None
            self.library.gemma2_emulator_check_written.restype = ctypes.c_char_p

    def run(
        self,
        name: str,
        *inputs: Tensor | None,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.int32,
        before: Tensor | None = None,
        n: int = 1,
    ) -> Tensor:
        """What the kernel writes: a tensor of `shape` and `dtype`, or one that held `before`."""
        a, b, c = [
            None if x is None else x.contiguous().to(self.device)
            for x in (*inputs, None, None, None)[:3]
        ]
        if before is None:
            d = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            d = before.contiguous().clone().to(self.device)
        if self.emulated:
            self.library.gemma2_emulator_clear_regions()
            access = {"a": READ, "b": READ, "c": READ, "d": WRITE if before is None else READ_WRITE}
            for key, x in {"a": a, "b": b, "c": c, "d": d}.items():
                if x is not None:
                    size = x.numel() * x.element_size()
                    self.library.gemma2_emulator_add_region(
                        key.encode(), x.data_ptr(), 1, size, size, access[key]
                    )
        stream = None if self.emulated else torch.cuda.current_stream().cuda_stream
        pointers = [None if x is None else x.data_ptr() for x in (a, b, c, d)]
        error = self.library.gemma2_twin(name.encode(), *pointers, n, stream)
        if error is None and self.emulated:
            error = self.library.gemma2_emulator_check_written(name.encode())
        if self.emulated:
            self.library.gemma2_emulator_clear_regions()
        if error is not None:
            raise TwinError(error.decode())
        return d.cpu()


KINDS = ("emulated", "cuda")


def library(kind: str) -> tuple[str | None, str]:
    """Path of the library and, if there is none that can be used here, why not."""
    path = os.environ.get(f"GEMMA2_{kind.upper()}_TWINS")
    if kind == "emulated":
        return path or (str(LIBRARY) if LIBRARY.exists() else None), "not built: make emulator"
    if not torch.cuda.is_available():
        return None, "torch sees no GPU"
    return path, "GEMMA2_CUDA_TWINS names no library"


def load(kind: str) -> Twins:
    path, reason = library(kind)
    if path is None:
        pytest.skip(reason)
    return Twins(str(Path(path).resolve()), "cpu" if kind == "emulated" else "cuda")


AVAILABLE = [kind for kind in KINDS if library(kind)[0] is not None]
if not AVAILABLE:
    reasons = "; ".join(f"{kind}: {library(kind)[1]}" for kind in KINDS)
    pytest.skip(reasons, allow_module_level=True)


@pytest.fixture(scope="module", params=AVAILABLE)
def twins(request):
    return load(request.param)


@pytest.fixture(scope="module")
def emulated():
    return load("emulated")


@pytest.mark.parametrize("kind", KINDS)
def test_library(kind):
    """Skipped, with the reason, for the kind that the other tests leave out."""
    with pytest.raises(TwinError, match="no twin of this name"):
        load(kind).run("mma_17x8x16", shape=(1,))


def bits_of(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, zeros with their sign; a NaN need only be one."""
    assert torch.equal(actual.isnan(), expected.isnan())
    wrong = (bits_of(actual) != bits_of(expected)) & ~expected.isnan()
    at = wrong.nonzero()[:3, 0]
    assert not wrong.any(), f"{actual[at].tolist()} instead of {expected[at].tolist()}"


# ---- The tables of the manual ----


@pytest.mark.parametrize("shape", ["M16N8K16", "M16N8K8_TF32", "M16N8K32_S8"])
def test_the_fragments_of_all_lanes_are_the_matrix(shape):
    shape = getattr(fragments, shape)
    for table, rows, cols in [
        (shape.a, shape.m, shape.k),
        (shape.b, shape.k, shape.n),
        (shape.c, shape.m, shape.n),
    ]:
        places = {tuple(place) for place in table.flatten(0, 1).tolist()}
        assert len(places) == table.shape[0] * table.shape[1] == rows * cols
        assert places == {(row, col) for row in range(rows) for col in range(cols)}


# A few cells as the manual's figures print them: figure -> lane, element, row, column.
FIGURES = {
    "M16N8K16.a": [(0, 0, 0, 0), (0, 2, 8, 0), (0, 4, 0, 8), (0, 7, 8, 9), (5, 1, 1, 3)],
    "M16N8K16.b": [(0, 1, 1, 0), (3, 0, 6, 0), (0, 2, 8, 0), (31, 3, 15, 7)],
    "M16N8K16.c": [(0, 1, 0, 1), (0, 2, 8, 0), (4, 0, 1, 0), (31, 3, 15, 7)],
    "M16N8K8_TF32.a": [(1, 0, 0, 1), (0, 1, 8, 0), (0, 2, 0, 4), (31, 3, 15, 7)],
    "M16N8K8_TF32.b": [(1, 0, 1, 0), (0, 1, 4, 0), (4, 0, 0, 1)],
    "M16N8K32_S8.a": [(1, 0, 0, 4), (0, 4, 8, 0), (0, 8, 0, 16), (31, 15, 15, 31)],
    "M16N8K32_S8.b": [(1, 3, 7, 0), (0, 4, 16, 0), (4, 0, 0, 1)],
}


@pytest.mark.parametrize("figure", FIGURES)
def test_the_tables_agree_with_the_figures(figure):
    shape, matrix = figure.split(".")
    table = getattr(getattr(fragments, shape), matrix)
    for lane, element, row, col in FIGURES[figure]:
        assert table[lane, element].tolist() == [row, col]


# ---- mma ----

MMA = {
    "mma_16x8x16_bf16": (fragments.M16N8K16, torch.bfloat16, torch.float32),
    "mma_16x8x16_f16": (fragments.M16N8K16, torch.float16, torch.float32),
    "mma_16x8x8_tf32": (fragments.M16N8K8_TF32, torch.float32, torch.float32),
    "mma_16x8x32_s8": (fragments.M16N8K32_S8, torch.int8, torch.int32),
}
FLOATING = [name for name in MMA if not name.endswith("s8")]


def mma(twins: Twins, name: str, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A [n, 16, k], B [n, k, 8], C [n, 16, 8] in numbers of the instruction -> D [n, 16, 8]."""
    shape, dtype, accumulator = MMA[name]
    n = len(A)
    a = to_lanes(A.to(dtype), shape.a).view(torch.int32)
    b = to_lanes(B.to(dtype), shape.b).view(torch.int32)
    c = to_lanes(C.to(accumulator), shape.c)
    d = twins.run(name, a, b, c, shape=(n, 32, 4), dtype=accumulator, n=n)
    return from_lanes(d, shape.c, shape.m, shape.n)


def one_hot(rows: int, cols: int) -> Tensor:
    """[rows * cols, rows, cols]: matrix i has its one at element i."""
    return torch.eye(rows * cols).reshape(-1, rows, cols)


def distinct(rows: int, cols: int) -> Tensor:
    """Whole numbers that all types hold exactly, different along each row and column."""
    row, col = torch.arange(rows)[:, None], torch.arange(cols)
    return ((11 * row + 13 * col) % 256 - 128).float()


@pytest.mark.parametrize("name", MMA)
def test_every_element_of_a_meets_its_row_of_b(twins, name):
    shape, _, accumulator = MMA[name]
    A = one_hot(shape.m, shape.k)
    B = distinct(shape.k, shape.n).expand(len(A), -1, -1)
    D = mma(twins, name, A, B, torch.zeros(len(A), shape.m, shape.n))
    assert torch.equal(D, (A @ B).to(accumulator))


@pytest.mark.parametrize("name", MMA)
def test_every_element_of_b_meets_its_column_of_a(twins, name):
    shape, _, accumulator = MMA[name]
    B = one_hot(shape.k, shape.n)
    A = distinct(shape.m, shape.k).expand(len(B), -1, -1)
    D = mma(twins, name, A, B, torch.zeros(len(B), shape.m, shape.n))
    assert torch.equal(D, (A @ B).to(accumulator))


@pytest.mark.parametrize("name", MMA)
def test_every_element_of_c_is_added_in_its_place(twins, name):
    shape, _, accumulator = MMA[name]
    C = one_hot(shape.m, shape.n) * 7
    A = torch.zeros(len(C), shape.m, shape.k)
    D = mma(twins, name, A, torch.zeros(len(C), shape.k, shape.n), C)
    assert torch.equal(D, C.to(accumulator))


@pytest.mark.parametrize("name", MMA)
def test_every_element_of_d_is_one_product(twins, name):
    shape, _, accumulator = MMA[name]
    n = shape.m * shape.n
    place = torch.arange(n)
    row, col = place // shape.n, place % shape.n
    k = (row + 3 * col) % shape.k
    A, B = torch.zeros(n, shape.m, shape.k), torch.zeros(n, shape.k, shape.n)
    A[place, row, k] = 5
    B[place, k, col] = -3
    D = mma(twins, name, A, B, torch.zeros(n, shape.m, shape.n))
    assert torch.equal(D, (-15 * one_hot(shape.m, shape.n)).to(accumulator))


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of several magnitudes; float32 as tf32 has it, whose low 13 bits are zero."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-4, 5, shape)
    if dtype == torch.float32:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(dtype).float()


@pytest.mark.parametrize("name", FLOATING)
def test_random_products_are_exact_within_float32_sums_in_any_order(twins, name):
    shape, dtype, _ = MMA[name]
    n = 40
    A, B = random_numbers((n, 16, shape.k), dtype), random_numbers((n, shape.k, 8), dtype)
    C = torch.randn(n, 16, 8) * 10
    D = mma(twins, name, A, B, C)
    exact = A.double() @ B.double() + C.double()
    size = A.double().abs() @ B.double().abs() + C.double().abs()
    # k additions and the result, each rounded or truncated to 24 bits.
    assert ((D.double() - exact).abs() <= (shape.k + 1) * 2.0**-23 * size).all()
    assert (D - C).abs().max() > 1


@pytest.mark.parametrize("name", FLOATING)
def test_nan_and_infinity_reach_their_row_and_no_other(twins, name):
    shape = MMA[name][0]
    A, B = torch.ones(2, 16, shape.k), torch.ones(2, shape.k, 8)
    A[0, 3, 5], A[1, 12, shape.k - 1] = torch.nan, -torch.inf
    D = mma(twins, name, A, B, torch.zeros(2, 16, 8))
    rows = torch.arange(16)
    assert D[0, 3].isnan().all()
    assert (D[0, rows != 3] == shape.k).all()
    assert (D[1, 12] == -torch.inf).all()
    assert (D[1, rows != 12] == shape.k).all()


def test_int8_products_are_exact(twins):
    A, B = torch.randint(-128, 128, (40, 16, 32)), torch.randint(-128, 128, (40, 32, 8))
    A[0], B[0] = -128, -128
    A[1], B[1] = -128, 127
    C = torch.randint(-(2**24), 2**24, (40, 16, 8))
    D = mma(twins, "mma_16x8x32_s8", A, B, C)
    assert torch.equal(D.long(), A @ B + C)
    assert (D[0].long() - C[0] == 32 * 128 * 128).all()


def test_int8_sums_that_do_not_fit_wrap(twins):
    A, B = torch.ones(2, 16, 32), torch.ones(2, 32, 8)
    A[1] = -1
    C = torch.tensor([2**31 - 1, -(2**31)]).reshape(2, 1, 1).expand(2, 16, 8)
    D = mma(twins, "mma_16x8x32_s8", A, B, C)
    assert (D[0] == -(2**31) + 31).all()
    assert (D[1] == 2**31 - 32).all()


def test_the_low_13_bits_of_tf32_move_a_product_by_at_most_its_inputs_last_places(twins):
    A, B = torch.randn(20, 16, 8), torch.randn(20, 8, 8)
    zeros = torch.zeros(20, 16, 8)
    D = mma(twins, "mma_16x8x8_tf32", A, B, zeros)
    size = A.double().abs() @ B.double().abs()
    error = (D.double() - A.double() @ B.double()).abs()
    assert (error <= (2 * 2.0**-10 + 2.0**-18) * size).all()


@pytest.mark.parametrize("low", [0x0001, 0x1000, 0x1FFF])
def test_nobody_can_count_on_the_low_13_bits_of_tf32_under_the_emulator(emulated, low):
    def cut(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    x = (cut(torch.randn(20, 16, 8)).view(torch.int32) | low).view(torch.float32)
    D = mma(emulated, "mma_16x8x8_tf32", x, torch.eye(8).expand(20, 8, 8), torch.zeros(20, 16, 8))
    assert torch.equal(cut(D), cut(x))
    assert (cut(x) == D).double().mean() < 0.01  # not truncated
    assert (x == D).double().mean() < 0.01  # nor more exact than tf32


# ---- ldmatrix and stmatrix ----


def tables(transposed: bool) -> Tensor:
    return fragments.M8N8_TRANSPOSED if transposed else fragments.M8N8


def form(instruction: str, count: int, transposed: bool) -> str:
    return f"{instruction}{'_transposed' if transposed else ''}_x{count}"


def addresses(where: str, count: int) -> Tensor:
    """[32] row addresses in 2048 bytes; those of lanes that give none are no addresses at all."""
    lane = torch.arange(32)
    rows = {
        "side by side": lane * 16,
        "strided": lane * 64,
        "backwards": 2032 - lane * 16,
        "anywhere": torch.randperm(128)[:32] * 16,
    }[where]
    return torch.where(lane < 8 * count, rows, 3).int()


def elements_at(rows: Tensor, count: int) -> Tensor:
    """[count, 8, 8]: the 16-bit element of shared memory in which every matrix element lies."""
    return (rows[: 8 * count].long() // 2)[:, None].add(torch.arange(8)).reshape(count, 8, 8)


FORMS = pytest.mark.parametrize(
    ("count", "transposed"), [(c, t) for c in (1, 2, 4) for t in (False, True)]
)
PLACES = pytest.mark.parametrize("where", ["side by side", "strided", "backwards", "anywhere"])


@FORMS
@PLACES
def test_ldmatrix_gives_every_lane_its_elements(twins, count, transposed, where):
    rows = addresses(where, count)
    memory = torch.arange(1024, dtype=torch.int16)  # no two elements are equal
    name = form("ldmatrix", count, transposed)
    r = twins.run(name, memory.view(torch.int32), rows, shape=(32, count))
    matrices = memory[elements_at(rows, count)]
    expected = to_lanes(matrices, tables(transposed)).view(torch.int32)  # [count, 32, 1]
    assert torch.equal(r, expected[..., 0].T)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_may_read_a_row_many_times(twins, transposed):
    memory = torch.arange(1024, dtype=torch.int16)
    rows = torch.full((32,), 160, dtype=torch.int32)
    name = form("ldmatrix", 4, transposed)
    r = twins.run(name, memory.view(torch.int32), rows, shape=(32, 4))
    matrices = memory[elements_at(rows, 4)]
    assert torch.equal(r, to_lanes(matrices, tables(transposed)).view(torch.int32)[..., 0].T)


def skip_before_sm_90(twins: Twins) -> None:
    if not twins.emulated and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("stmatrix needs compute capability 9.0")


@FORMS
@PLACES
def test_stmatrix_puts_every_element_into_its_place_and_nothing_elsewhere(
    twins, count, transposed, where
):
    skip_before_sm_90(twins)
    rows = addresses(where, count)
    r = torch.randint(-(2**31), 2**31, (32, count)).int()
    memory = torch.randint(-(2**15), 2**15, (1024,)).short()
    name = form("stmatrix", count, transposed)
    after = twins.run(name, r, rows, memory.view(torch.int32), shape=(512,)).view(torch.int16)
    halves = r.T.contiguous()[..., None].view(torch.int16)  # [count, 32, 2]
    expected = memory.clone()
    expected[elements_at(rows, count)] = from_lanes(halves, tables(transposed), 8, 8)
    assert torch.equal(after, expected)


@FORMS
def test_ldmatrix_takes_back_what_stmatrix_wrote(twins, count, transposed):
    skip_before_sm_90(twins)
    rows = addresses("anywhere", count)
    r = torch.randint(-(2**31), 2**31, (32, count)).int()
    memory = torch.zeros(512, dtype=torch.int32)
    stored = twins.run(form("stmatrix", count, transposed), r, rows, memory, shape=(512,))
    loaded = twins.run(form("ldmatrix", count, transposed), stored, rows, shape=(32, count))
    assert torch.equal(loaded, r)


# ---- Within a warp ----

LANE = torch.arange(32)


def lanes_of(masks: list[int]) -> Tensor:
    """[n] masks as the 32-bit words that kernels take."""
    return torch.tensor(masks, dtype=torch.int64).to(torch.int32)


def in_mask(masks: list[int]) -> Tensor:
    return (torch.tensor(masks)[:, None] >> LANE & 1).bool()


def random_words(shape: tuple[int, ...], bits: int) -> Tensor:
    words = torch.randint(-(2**63), 2**63 - 1, shape)
    return words if bits == 64 else (words >> 32).int()


def check_shuffle(twins, name, bits, arguments, sources, masks):
    """arguments and sources: [n, 32]; lanes out of the mask keep their own value."""
    n = len(masks)
    v = random_words((n, 32), bits)
    sources = torch.where(in_mask(masks), sources, LANE)
    got = twins.run(
        f"{name}_{bits}", v, arguments.int(), lanes_of(masks), shape=(n, 32), dtype=v.dtype, n=n
    )
    assert torch.equal(got, v.gather(1, sources))


@pytest.mark.parametrize("bits", [32, 64])
def test_shuffle_gives_the_value_of_any_lane(twins, bits):
    arguments = torch.randint(0, 32, (40, 32))
    arguments[0], arguments[1] = 0, 31
    arguments[2], arguments[3] = -1, LANE + 32  # of which five bits count
    check_shuffle(twins, "shuffle", bits, arguments, arguments & 31, [ALL_LANES] * 40)


@pytest.mark.parametrize("bits", [32, 64])
def test_shuffle_among_some_lanes(twins, bits):
    low, odd = torch.randint(0, 16, (32,)), torch.randint(0, 16, (32,)) * 2 + 1
    arguments = torch.stack([low, odd])
    check_shuffle(twins, "shuffle", bits, arguments, arguments, [0x0000FFFF, 0xAAAAAAAA])


@pytest.mark.parametrize("bits", [32, 64])
def test_shuffle_xor_swaps_with_the_partner(twins, bits):
    arguments = LANE[:, None].expand(32, 32)
    check_shuffle(twins, "shuffle_xor", bits, arguments, LANE ^ arguments, [ALL_LANES] * 32)
    some = torch.tensor([1, 5, 7])[:, None].expand(3, 32)
    check_shuffle(twins, "shuffle_xor", bits, some, LANE ^ some, [0xFF00FF00] * 3)


@pytest.mark.parametrize("bits", [32, 64])
def test_shuffle_up_takes_from_below_and_keeps_at_the_lower_end(twins, bits):
    deltas = LANE[:, None].expand(32, 32)
    sources = torch.where(deltas <= LANE, LANE - deltas, LANE)
    check_shuffle(twins, "shuffle_up", bits, deltas, sources, [ALL_LANES] * 32)
    check_shuffle(twins, "shuffle_up", bits, deltas, sources, [0x00000FFF] * 32)


@pytest.mark.parametrize("bits", [32, 64])
def test_shuffle_down_takes_from_above_and_keeps_at_the_upper_end(twins, bits):
    deltas = LANE[:, None].expand(32, 32)
    sources = torch.where(deltas + LANE <= 31, LANE + deltas, LANE)
    check_shuffle(twins, "shuffle_down", bits, deltas, sources, [ALL_LANES] * 32)
    check_shuffle(twins, "shuffle_down", bits, deltas, sources, [0xFFF00000] * 32)


def test_votes(twins):
    masks = [ALL_LANES] * 20 + [0x0000FFFF, 0x80000001, 0xAAAAAAAA, 0x00000010] * 5
    n = len(masks)
    p = torch.rand(n, 32) < torch.rand(n, 1)
    p[0], p[1] = True, False
    p[2], p[3] = LANE != 17, LANE == 31
    p[20], p[21] = LANE < 16, ~in_mask(masks)[21]
    inside = in_mask(masks)
    ballot = (p & inside).long() @ (1 << LANE)
    some, every = (p & inside).any(1), (p | ~inside).all(1)
    expected = torch.stack([ballot.to(torch.int32), some.int(), every.int()], dim=1)
    got = twins.run("votes", p.int(), None, lanes_of(masks), shape=(n, 32, 3), n=n)
    assert torch.equal(got, expected[:, None] * inside[..., None].int())


# ---- Numbers ----

SIXTEEN_BITS = {"bf16": torch.bfloat16, "f16": torch.float16}
ALL_PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int16)
CANONICAL_NAN = 0x7FFF


def from_float(twins: Twins, name: str, x: Tensor) -> Tensor:
    return twins.run(f"from_float_{name}", x, shape=x.shape, dtype=SIXTEEN_BITS[name], n=x.numel())


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_every_16_bit_pattern_becomes_the_float32_of_torch(twins, name):
    x = ALL_PATTERNS.view(SIXTEEN_BITS[name])
    y = twins.run(f"to_float_{name}", x, shape=x.shape, dtype=torch.float32, n=x.numel())
    assert_same_numbers(y, x.float())


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_every_16_bit_pattern_comes_back(twins, name):
    x = ALL_PATTERNS.view(SIXTEEN_BITS[name])
    y = from_float(twins, name, x.float())
    assert_same_numbers(y, x)
    assert (bits_of(y)[x.isnan()] == CANONICAL_NAN).all()


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_numbers_halfway_between_two_16_bit_numbers_go_to_the_even_one(twins, name, offset):
    dtype = SIXTEEN_BITS[name]
    finite = ALL_PATTERNS[ALL_PATTERNS.view(dtype).isfinite()]
    x, next_x = finite.view(dtype).double(), (finite + 1).view(dtype).double()
    # Beyond the largest number, as if there were one more.
    largest = 2 * x - (finite - 1).view(dtype).double()
    halfway = ((x + torch.where(next_x.isfinite(), next_x, largest)) / 2).float()
    moved = (bits_of(halfway) + offset).view(torch.float32)
    assert_same_numbers(from_float(twins, name, moved), moved.to(dtype))


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_random_float32_numbers_are_rounded_as_in_torch(twins, name):
    every_exponent = torch.randint(-(2**31), 2**31, (40000,)).int().view(torch.float32)
    # Within the range of float16 and its subnormal numbers, too.
    usual = torch.randn(40000) * 2.0 ** torch.randint(-28, 18, (40000,))
    x = torch.cat([every_exponent, usual, torch.tensor([torch.inf, -torch.inf, -0.0, torch.nan])])
    assert_same_numbers(from_float(twins, name, x), x.to(SIXTEEN_BITS[name]))


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_pack2_puts_the_first_number_into_the_low_half(twins, name):
    x = torch.cat([torch.randn(1000, 2) * 100, torch.tensor([[torch.nan, 1], [1e30, -1e30]])])
    words = twins.run(f"pack2_{name}", x, shape=(len(x),), n=len(x))
    pairs = words[:, None].view(SIXTEEN_BITS[name])
    assert_same_numbers(pairs.flatten(), x.to(SIXTEEN_BITS[name]).flatten())


# ---- Approximate functions ----


def of_each(twins: Twins, name: str, x: Tensor) -> Tensor:
    return twins.run(name, x, shape=x.shape, dtype=torch.float32, n=x.numel())


def test_exp2_approx_is_within_2_units_in_the_last_place_and_not_exact(twins):
    x = torch.cat([torch.rand(20000) * 253 - 125.5, torch.randn(20000), torch.arange(-125.0, 128)])
    y = of_each(twins, "exp2_approx", x).double()
    exact = torch.exp2(x.double())
    nearest = exact.float().double()
    unit = 2.0 ** (torch.frexp(nearest).exponent - 24).double()
    error = (y - nearest).abs() / unit
    assert error.max() <= 2
    assert error.max() >= (2 if twins.emulated else 1)
    if twins.emulated:  # the bound of older manuals
        assert ((y - exact).abs() / exact).max() <= 2.0**-22


def test_exp2_approx_of_special_values(twins):
    tiny = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    assert (of_each(twins, "exp2_approx", tiny) == 1).all()
    x = torch.tensor([torch.inf, 128.0, 1e30, -torch.inf, -126.5, -140.0, -1e30, torch.nan])
    y = of_each(twins, "exp2_approx", x)
    assert (y[:3] == torch.inf).all()
    assert bits_of(y[3:7]).tolist() == [0] * 4  # subnormal results become +0, too
    assert y[7].isnan()
    smallest = of_each(twins, "exp2_approx", -126 + torch.arange(64) * 2.0**-17)
    assert ((smallest == 0) | (smallest >= 2.0**-126)).all()
    assert (smallest[1:] > 0).all()


def test_tanh_approx_has_a_relative_error_of_at_most_2_to_the_minus_11_and_is_not_exact(twins):
    x = torch.cat([torch.randn(20000), torch.randn(20000) * 2.0 ** torch.randint(-60, 6, (20000,))])
    x = x[x != 0]
    exact = torch.tanh(x.double())
    error = ((of_each(twins, "tanh_approx", x).double() - exact) / exact).abs()
    assert error.max() <= 2.0**-11
    assert error.max() >= 2.0 ** (-11.1 if twins.emulated else -16)


def test_tanh_approx_of_special_values(twins):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -1e-40, torch.nan])
    y = of_each(twins, "tanh_approx", x)
    assert (
        bits_of(y[:6]).tolist() == bits_of(torch.tensor([0.0, -0.0, 1, -1, 1e-40, -1e-40])).tolist()
    )
    assert y[6].isnan()


# ---- Asynchronous copies ----


@pytest.mark.parametrize("valid", ["all", "none", "some"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copy_async_copies_or_writes_zeros_and_then_reads_nothing(twins, size, valid):
    memory = torch.randint(-(2**31), 2**31, (512,)).int()
    taken = {"all": LANE >= 0, "none": LANE < 0, "some": LANE % 3 != 1}[valid]
    chunk = torch.randperm(2048 // size)[:32]
    beyond = 2**20 // size + chunk  # where there is nothing to be read
    sources = torch.stack([torch.where(taken, chunk, beyond) * size, taken.int()], dim=1)
    words = size // 4
    got = twins.run(f"copy_async_{size}", memory, sources.int(), shape=(32, words))
    expected = memory.reshape(-1, words)[chunk] * taken[:, None]
    assert torch.equal(got, expected.int())


def test_a_wait_for_groups_is_for_the_oldest_ones(twins):
    x = torch.randint(-(2**31), 2**31, (32, 4, 4)).int()
    assert torch.equal(twins.run("copy_async_groups", x, shape=(32, 4, 4)), x)


# ---- Atomics ----

CELLS = 64


def atomics(twins: Twins, name: str, cell: Tensor, values: Tensor, cells: Tensor):
    """(cells after, what every thread found)."""
    n = len(cell)
    before = torch.cat([cells, torch.full((n,), -77, dtype=cells.dtype)])
    d = twins.run(name, cell.int(), values, before=before, n=n)
    return d[:CELLS], d[CELLS:]


@pytest.mark.parametrize("bits", [32, 64])
def test_atomic_add_loses_nothing(twins, bits):
    cell = torch.randint(0, CELLS, (1000,))
    values, cells = random_words((1000,), bits), random_words((CELLS,), bits)
    after, _ = atomics(twins, f"atomic_add_{bits}", cell, values, cells)
    assert torch.equal(after, cells.clone().index_add_(0, cell, values))  # both wrap


def test_atomic_add_gives_everybody_a_number_of_its_own(twins):
    cell = torch.arange(1000) % 3
    ones, cells = torch.ones(1000, dtype=torch.int32), torch.arange(CELLS).int() * 1000
    after, found = atomics(twins, "atomic_add_32", cell, ones, cells)
    for c in range(3):
        assert found[cell == c].sort().values.tolist() == list(range(c * 1000, int(after[c])))
    assert torch.equal(after[3:], cells[3:])


def test_atomic_or_collects_bits(twins):
    cell = torch.randint(0, CELLS, (1000,))
    values, cells = (1 << torch.randint(0, 31, (1000,))).int(), random_words((CELLS,), 32)
    after, found = atomics(twins, "atomic_or_32", cell, values, cells)
    expected = cells.clone()
    for c, value in zip(cell.tolist(), values, strict=True):
        expected[c] |= value
    assert torch.equal(after, expected)
    assert torch.equal(found | after[cell], after[cell])
    assert torch.equal(found & cells[cell], cells[cell])


def test_atomic_max_keeps_the_largest_signed_number(twins):
    cell = torch.randint(0, CELLS, (1000,))
    values, cells = random_words((1000,), 32), random_words((CELLS,), 32)
    after, found = atomics(twins, "atomic_max_32", cell, values, cells)
    assert torch.equal(after, cells.clone().scatter_reduce_(0, cell, values, "amax"))
    assert (found >= cells[cell]).all()
    assert (found <= after[cell]).all()


# ---- What the emulator counts and refuses ----


def count(name: str, *arguments, **keywords):
    """The counters of one emulated kernel."""
    twins = load("emulated")
    with Emulator(Path(twins.library._name)).counting() as counters:
        twins.run(name, *arguments, **keywords)
    (of_kernel,) = counters.values()
    return of_kernel


def test_mma_is_counted_once_a_warp(emulated):
    zeros = torch.zeros(5, 32, 4, dtype=torch.int32)
    for name, counter in [
        ("mma_16x8x16_bf16", "mma_16x8x16"),
        ("mma_16x8x8_tf32", "mma_16x8x8_tf32"),
        ("mma_16x8x32_s8", "mma_16x8x32_s8"),
    ]:
        counted = count(name, zeros, zeros[..., :2], zeros, shape=(5, 32, 4), n=5)
        assert counted["instructions"][counter] == 5


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (32, 8), (64, 16)])
def test_ldmatrix_and_stmatrix_take_a_wavefront_a_matrix_if_its_rows_lie_in_different_banks(
    emulated, stride, wavefronts
):
    memory, rows = torch.zeros(512, dtype=torch.int32), (LANE * stride).int()
    loading = count("ldmatrix_x4", memory, rows, shape=(32, 4))["shared"]["ldmatrix"]
    assert (loading["accesses"], loading["wavefronts"]) == (1, wavefronts)
    r = torch.zeros(32, 4, dtype=torch.int32)
    storing = count("stmatrix_x4", r, rows, memory, shape=(512,))["shared"]["stmatrix"]
    assert (storing["accesses"], storing["wavefronts"]) == (1, wavefronts)


KERNELS = (SOURCE / "twin_kernels.cu").read_text().splitlines()


def refused(emulated: Twins, says: str, at: str, name: str, *arguments, **keywords) -> None:
    """The kernel is stopped with a text that matches `says`, at a line that has `at` in it."""
    with pytest.raises(TwinError, match=says) as failure:
        emulated.run(name, *arguments, **keywords)
    line = re.search(r"tests/cuda/emulator/twin_kernels.cu:(\d+): ", str(failure.value))
    assert line is not None, failure.value
    assert at in KERNELS[int(line[1]) - 1], failure.value


NO_WORDS = torch.zeros(512, dtype=torch.int32)
NO_REGISTERS = torch.zeros(32, 4, dtype=torch.int32)


def test_an_unaligned_row_is_a_fault(emulated):
    rows = addresses("side by side", 4)
    rows[9] += 8
    says = r"thread \(9, 0, 0\).*{}.x4: the row at .* is not aligned to 16 bytes"
    load_says, store_says = says.format("ldmatrix"), says.format("stmatrix")
    refused(emulated, load_says, "ldmatrix(", "ldmatrix_x4", NO_WORDS, rows, shape=(32, 4))
    refused(
        emulated, store_says, "stmatrix(", "stmatrix_x4", NO_REGISTERS, rows, NO_WORDS, shape=(512,)
    )


def test_a_row_past_the_end_of_shared_memory_is_a_fault(emulated):
    rows = addresses("side by side", 2)
    rows[4] = 2048
    says = r"thread \(4, 0, 0\).*read of 16 bytes.*out of bounds"
    refused(emulated, says, "ldmatrix(", "ldmatrix_x2", NO_WORDS, rows, shape=(32, 2))


def test_a_row_in_global_memory_is_a_fault(emulated):
    says = "ldmatrix.x1: the row at .* is not in the block's shared memory"
    refused(emulated, says, "ldmatrix(", "ldmatrix_of_global_memory", NO_WORDS, shape=(32,))


def test_rows_of_stmatrix_that_overlap_are_a_race(emulated):
    rows = addresses("side by side", 4)
    rows[20] = rows[3]
    says = r"write of 16 bytes.*race"
    refused(emulated, says, "stmatrix(", "stmatrix_x4", NO_REGISTERS, rows, NO_WORDS, shape=(512,))


def test_half_a_warp_at_mma_is_a_fault(emulated):
    with pytest.raises(TwinError, match="mma_16x8x16"):
        emulated.run("mma_of_half_a_warp", shape=(32, 4), dtype=torch.float32)


def test_lanes_at_different_forms_of_an_instruction_are_a_fault(emulated):
    says = r"ldmatrix.x4.*ldmatrix.x2|ldmatrix.x2.*ldmatrix.x4"
    refused(emulated, says, "ldmatrix(", "different_forms", shape=(32,))
