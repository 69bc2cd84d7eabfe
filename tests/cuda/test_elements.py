"""What the contract tests do not reach in the memory-bound CUDA kernels, on the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from gemma2 import ops, reference
from tests.ops.tolerance import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shifted(t):
    """The same numbers, one element off 16 bytes."""
    room = torch.empty(*t.shape[:-1], t.shape[-1] + 8, dtype=t.dtype)
    view = room[..., 1 : 1 + t.shape[-1]]
    view.copy_(t)
    assert view.data_ptr() % 16 != 0
    return view


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 2304])
def test_alignment_changes_no_bit_of_a_norm(dtype, weight_dtype, hidden):
    x, w = torch.randn(3, hidden).to(dtype), torch.randn(hidden).to(weight_dtype)
    assert torch.equal(ops.rms_norm(shifted(x), w), ops.rms_norm(x, w))
    if dtype == weight_dtype:
        residual = torch.randn(3, hidden).to(torch.float32 if dtype == torch.float16 else dtype)
        expected = ops.add_rms_norm(residual, x, w, w)
        actual = ops.add_rms_norm(residual, shifted(x), w, w)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_changes_no_bit(dtype):
    gate, up = torch.randn(2, 3, 320).to(dtype)
    assert torch.equal(ops.geglu(shifted(gate), up), ops.geglu(gate, up))
    logits = 60 * torch.randn(4001).to(dtype)
    assert torch.equal(ops.softcap(logits[1:], 30.0), ops.softcap(logits[1:].clone(), 30.0))
    ids = torch.tensor([2, 0, 2])
    assert torch.equal(ops.embed(ids, shifted(gate), 7.3), ops.embed(ids, gate, 7.3))
    q, k = torch.randn(2, 2, 3, 4, 64).to(dtype)
    cos, sin = ops.rope_table(torch.arange(4)[None], 64)
    for a, b in zip(ops.rope(shifted(q), k, cos, sin), ops.rope(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (
        torch.zeros(2, 2, 3, 8, 64, dtype=dtype),
        torch.zeros(2, 2, 3, 8, 64, dtype=dtype),
    )
    where = torch.tensor([0, 3]), torch.tensor([4, 7])
    ops.cache_write(*ours, shifted(q), k, *where)
    ops.cache_write(*theirs, q, k, *where)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [
        (torch.float32, 8192),  # the longest rows in registers
        (torch.bfloat16, 16384),
        (torch.float32, 8196),  # the first that are read twice
        (torch.bfloat16, 16400),
    ],
)
def test_long_rows_match_float64(dtype, hidden):
    x, residual = torch.randn(2, 2, hidden).to(dtype)
    post, pre = torch.randn(2, hidden).to(dtype)
    assert_close_to_float64(
        ops.rms_norm(x, pre),
        reference.rms_norm(x, pre),
        reference.rms_norm(x.double(), pre.double()),
    )
    h, y = ops.add_rms_norm(residual, x, post, pre)
    wide = [t.double() for t in (residual, x, post, pre)]
    exact, _ = reference.add_rms_norm(*wide)
    assert_close_to_float64(h, reference.add_rms_norm(residual, x, post, pre)[0], exact, "h")
    assert_close_to_float64(
        y, reference.rms_norm(h, pre), reference.rms_norm(h.double(), pre.double()), "y"
    )


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_add_rms_norm_matches_float64_for_any_dtypes(residual_dtype, dtype, weight_dtype):
    residual, x = torch.randn(3, 129).to(residual_dtype), torch.randn(3, 129).to(dtype)
    post, pre = torch.randn(2, 129).to(weight_dtype)
    h, y = ops.add_rms_norm(residual, x, post, pre)
    eager, _ = reference.add_rms_norm(residual, x, post, pre)
    exact, _ = reference.add_rms_norm(*(t.double() for t in (residual, x, post, pre)))
    assert_close_to_float64(h, eager, exact, "h")
    assert_close_to_float64(
        y, reference.rms_norm(h, pre), reference.rms_norm(h.double(), pre.double()), "y"
    )


def test_more_rows_than_a_grid_is_wide_in_y():
    rows = 2**16 + 3
    gate = torch.randn(rows, 8)
    out = ops.geglu(gate[:, :4], gate[:, 4:])
    torch.testing.assert_close(out, reference.geglu(gate[:, :4], gate[:, 4:]))
    ids = torch.arange(rows) % 5
    assert torch.equal(ops.embed(ids, gate[:5], 1.0), gate[:5][ids])


class EmbedParams(ctypes.Structure):
    """csrc/params/embed.h."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("weight_dtype", ctypes.c_int8),
        ("out_dtype", ctypes.c_int8),
    )


class CudaCall(ctypes.Structure):
    """csrc/cuda/kernels.h."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
    )


@pytest.mark.parametrize(("last", "stops"), [(2, False), (3, True), (-1, True), (2**62, True)])
def test_an_id_outside_the_table_stops_the_kernel(emulator, last, stops):
    """On the device nobody has looked at the ids before."""
    table = emulator.library.gemma2_emulated_kernels()
    embed = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(
        ctypes.c_void_p.from_address(table).value
    )
    ids, weight, out = torch.tensor([0, last]), torch.randn(3, 20), torch.zeros(2, 20)
    params = EmbedParams(ids.data_ptr(), weight.data_ptr(), out.data_ptr(), 2, 20, 3, 20, 1.0, 0, 0)
    call = CudaCall()
    embed(ctypes.byref(params), ctypes.byref(call))
    if stops:
        assert b"embed: an id is not a row of the table" in call.error
    else:
        assert call.error is None
        assert torch.equal(out, weight[ids])
