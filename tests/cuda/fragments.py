"""Which element of a matrix lies in which register of which lane, as the PTX manual says it.

Transcribed from PTX ISA 9.0, section 9.7.14.5 ("Matrix Fragments for mma..."), 9.7.14.5.15
(ldmatrix) and 9.7.14.5.16 (stmatrix), case by case and in the manual's words; the code under test
has formulas of its own. `%laneid` is `lane`; an element a_i is element i, from low to high.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Place = tuple[int, int]  # row, column


def _table(place: Callable[[int, int], Place], elements: int) -> Tensor:
    """[32, elements, 2]: row and column of every element of every lane."""
    return torch.tensor([[place(lane, i) for i in range(elements)] for lane in range(32)])


# ---- mma.m16n8k16, .f16 and .bf16 ----


def _m16n8k16_a(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    if 0 <= i < 2 or 4 <= i < 6:
        row = group_id
    else:
        row = group_id + 8
    if i < 4:
        col = (thread_in_group * 2) + (i & 0x1)
    else:
        col = (thread_in_group * 2) + (i & 0x1) + 8
    return row, col


def _m16n8k16_b(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    if i < 2:
        row = (thread_in_group * 2) + (i & 0x1)
    else:
        row = (thread_in_group * 2) + (i & 0x1) + 8
    return row, group_id


# ---- mma.m16n8k8, .tf32 ----


def _m16n8k8_tf32_a(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    row = {0: group_id, 2: group_id, 1: group_id + 8, 3: group_id + 8}[i]
    col = {0: thread_in_group, 1: thread_in_group, 2: thread_in_group + 4, 3: thread_in_group + 4}[
        i
    ]
    return row, col


def _m16n8k8_tf32_b(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    row = {0: thread_in_group, 1: thread_in_group + 4}[i]
    return row, group_id


# ---- mma.m16n8k32, .s8 ----


def _m16n8k32_s8_a(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    if 0 <= i < 4 or 8 <= i < 12:
        row = group_id
    else:
        row = group_id + 8
    if i < 8:
        col = (thread_in_group * 4) + (i & 0x3)
    else:
        col = (thread_in_group * 4) + (i & 0x3) + 16
    return row, col


def _m16n8k32_s8_b(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    if i < 4:
        row = (thread_in_group * 4) + (i & 0x3)
    else:
        row = (thread_in_group * 4) + (i & 0x3) + 16
    return row, group_id


# ---- Accumulators C and D, .f32 and .s32, the same in all three shapes ----


def _m16n8_c(lane: int, i: int) -> Place:
    group_id, thread_in_group = lane >> 2, lane % 4
    row = group_id if i < 2 else group_id + 8
    return row, (thread_in_group * 2) + (i & 0x1)


# ---- ldmatrix and stmatrix, one 8x8 matrix of 16-bit elements ----
#
# "Each thread in a warp loads fragments of a row, with thread 0 receiving the first fragment in its
# register r, and so on. A group of four threads loads an entire row of the matrix". `.trans`: "the
# matrix is loaded in column-major format".


def _m8n8(lane: int, i: int) -> Place:
    fragments = [(row, (col, col + 1)) for row in range(8) for col in (0, 2, 4, 6)]
    row, cols = fragments[lane]
    return row, cols[i]


def _m8n8_transposed(lane: int, i: int) -> Place:
    fragments = [((row, row + 1), col) for col in range(8) for row in (0, 2, 4, 6)]
    rows, col = fragments[lane]
    return rows[i], col


class Shape:
    """Fragments of one shape of mma: m x n += m x k times k x n."""

    def __init__(
        self,
        k: int,
        a: Callable[[int, int], Place],
        b: Callable[[int, int], Place],
        elements_a: int,
        elements_b: int,
    ) -> None:
        self.m, self.n, self.k = 16, 8, k
        self.a = _table(a, elements_a)
        self.b = _table(b, elements_b)
        self.c = _table(_m16n8_c, 4)


M16N8K16 = Shape(16, _m16n8k16_a, _m16n8k16_b, 8, 4)
M16N8K8_TF32 = Shape(8, _m16n8k8_tf32_a, _m16n8k8_tf32_b, 4, 2)
M16N8K32_S8 = Shape(32, _m16n8k32_s8_a, _m16n8k32_s8_b, 16, 8)
M8N8 = _table(_m8n8, 2)
M8N8_TRANSPOSED = _table(_m8n8_transposed, 2)


def to_lanes(matrix: Tensor, table: Tensor) -> Tensor:
    """Fragments [..., 32, elements] of a matrix [..., rows, cols]."""
    return matrix[..., table[..., 0], table[..., 1]].contiguous()


def from_lanes(fragments: Tensor, table: Tensor, rows: int, cols: int) -> Tensor:
    """The way back."""
    matrix = fragments.new_zeros(*fragments.shape[:-2], rows, cols)
    matrix[..., table[..., 0], table[..., 1]] = fragments
    return matrix
