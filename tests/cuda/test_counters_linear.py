"""What linear moves on CUDA, counted by the emulator: the weights once, whatever there is beside them.

The emulated device is made small where blocks should go through many tiles.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma2 import ops, reference, tiny
from tests.cuda.emulation import Landing, Order
from tests.ops.tolerance import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("emulated")

BF16, F16 = torch.bfloat16, torch.float16
FEW, TILE, F32 = "linear few", "linear tile", "linear f32"
kernel = torch.ops.gemma2.linear


@pytest.fixture
def multiprocessors(monkeypatch):
    """`multiprocessors(1)`: the emulated device has so many."""
    return lambda n: monkeypatch.setenv("GEMMA2_EMULATED_MULTIPROCESSORS", str(n))


@pytest.fixture
def count(emulator):
    """`count(x, weight)`: the name and the counters of the only kernel that is launched."""

    def count(x, weight):
        with emulator.counting() as counters:
            kernel(x, weight)
        ((name, only),) = counters.items()
        assert only["launches"] == 1
        return name, only

    return count


def make(m, n, k, dtype=BF16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, k, generator=g).to(dtype) for rows in (m, n)]


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def conflicts(counters):
    return {
        name: bank["conflicts"] for name, bank in counters["shared"].items() if bank["conflicts"]
    }


# q, k and o of the 2B model; down and the 9B's q with fewer columns of out; ragged ones.
SHAPES = [(2048, 2304), (1024, 2304), (288, 2048), (96, 9216), (96, 3584), (40, 264), (33, 2568)]


@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_few_rows_read_the_weights_once_in_requests_of_16_bytes_a_lane(count, m, n, k):
    x, weight = make(m, n, k)
    name, counters = count(x, weight)
    assert name == FEW
    assert counters["region_read"]["weight"] == bytes_of(weight)
    assert counters["region_written"] == {"out": 2 * m * n}
    if k % 64 == 0:  # whole lines: what is read are whole sectors, and 4 lines a request
        assert conflicts(counters) == {}
        read = counters["global_read"]
        assert read["bytes"] == bytes_of(weight) + counters["region_read"]["x"]
        copied = counters["region_read"]["weight"] // 512
        assert read["requests"] - copied == 16 * (-(-m // 8)) * 2 * counters["blocks"] * (k // 256)


@pytest.mark.parametrize(("m", "blocks"), [(1, 2), (8, 2), (16, 1)])
@pytest.mark.parametrize(("n", "k"), [(1024, 2304), (480, 2048)])
def test_many_tiles_of_a_block_take_x_once(count, multiprocessors, m, blocks, n, k):
    multiprocessors(1)
    x, weight = make(m, n, k)
    _, counters = count(x, weight)
    assert counters["blocks"] == blocks
    moved = 32 * (counters["global_read"]["distinct"] + counters["global_write"]["distinct"])
    assert moved <= 1.05 * (bytes_of(x, weight) + 2 * m * n)


@pytest.mark.parametrize(("k", "warps", "rounds"), [(2304, 9, 1), (2048, 8, 1), (9216, 9, 4)])
def test_a_round_of_a_tile_takes_one_barrier(count, multiprocessors, k, warps, rounds):
    multiprocessors(2)
    x, weight = make(3, 16 * 16, k)
    _, counters = count(x, weight)
    assert counters["blocks"] == 4
    assert counters["threads"] == 4 * 32 * warps
    assert counters["barriers"] == 16 * rounds


def test_blocks_have_the_same_number_of_tiles(count):
    """144 tiles are 144 blocks where 264 run at a time; 289 are 145 with two each."""
    assert count(*make(1, 16 * 144, 32))[1]["blocks"] == 144
    assert count(*make(1, 16 * 289, 32))[1]["blocks"] == 145


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 24, 264), (17, 24, 264), (1, 24, 263)])
def test_which_kernel_takes_it(count, dtype, m, n, k):
    few = m <= 16 and k % 8 == 0
    assert count(*make(m, n, k, dtype))[0] == (FEW if few else TILE)
    assert count(*make(m, n, k, torch.float32))[0] == F32


@pytest.mark.parametrize(("m", "n", "k"), [(128, 64, 512), (200, 136, 320), (17, 72, 264)])
def test_tiles_read_each_operand_once_for_each_tile_of_the_other(count, m, n, k):
    x, weight = make(m, n, k)
    name, counters = count(x, weight)
    rows, columns = -(-m // 128), -(-n // 64)
    assert name == TILE
    assert counters["blocks"] == rows * columns
    assert counters["region_read"] == {
        "x": columns * bytes_of(x),
        "weight": rows * bytes_of(weight),
    }
    assert counters["region_written"] == {"out": 2 * m * n}
    assert conflicts(counters) == {}
    assert counters["barriers"] == counters["blocks"] * (-(-k // 64) + 2)


def test_float32_reads_each_operand_once_for_each_tile_of_the_other(count):
    x, weight = make(70, 130, 100, torch.float32)
    name, counters = count(x, weight)
    assert name == F32
    assert counters["region_read"] == {"x": 3 * bytes_of(x), "weight": 2 * bytes_of(weight)}
    assert conflicts(counters) == {}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("m", [1, 8, 11])
@pytest.mark.parametrize(("n", "k"), [(230, 2568), (70, 4864)])
def test_many_tiles_and_rounds_in_a_block_match_float64(multiprocessors, dtype, m, n, k):
    multiprocessors(1)
    x, weight = make(m, n, k, dtype)
    exact = reference.linear(x.double(), weight.double())
    assert_close_to_float64(kernel(x, weight), F.linear(x, weight), exact)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 200, 4864), (12, 40, 2304), (40, 70, 264)])
def test_the_order_of_threads_and_copies_shows_in_no_bit(emulator, multiprocessors, m, n, k):
    multiprocessors(1)
    x, weight = make(m, n, k)
    results = []
    for order in Order:
        for landing in Landing:
            emulator.configure(seed=len(results), order=order, landing=landing)
            results.append(kernel(x, weight))
    emulator.configure()
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_the_embedded_models_logits_do_not_depend_on_the_batch(emulator):
    """Products of 5 rows, and of 20: few rows, and tiles."""
    model = tiny.load_causal_lm().to(BF16).eval()
    ids = torch.tensor([[2, 17, 300, 41, 9], [2, 5, 6, 7, 8], [2, 90, 1, 4, 7], [2, 3, 3, 3, 3]])
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad(), emulator.counting() as counters:
            alone = model(ids[:1]).logits
            together = model(ids).logits
    finally:
        torch.use_deterministic_algorithms(False)
    assert {FEW, TILE} <= set(counters)
    assert torch.equal(alone[0], together[0])


def test_the_model_takes_the_kernel_only_for_few_rows(emulator, monkeypatch):
    """What `ops.linear` asks of CUDA tensors, asked of emulated ones."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    counts = {}
    for m in (16, 17):
        with torch.no_grad(), emulator.counting() as counters:
            ops.linear(*make(m, 24, 256))
        counts[m] = set(counters)
    assert counts == {16: {FEW}, 17: set()}
