// What both kernels of linear for 16-bit numbers have in common: the order in which they sum. It is
// the same for any number of rows, and so are a row's bits.
//
// K is cut into segments of 256. A segment is one chain of tensor-core products, 16 k each, by
// rising k; segments are added in order, in float32. What lies beyond K counts as zeros, which add
// nothing. Weights are operand A and rows of x operand B everywhere, so that what the hardware does
// inside of an instruction is the same, too.
//
// A lane gives an instruction four bytes here and four bytes there of a row; it reads 16 bytes. Two
// instructions take these 16 as they lie, which permutes k within a step of 32, in A as in B.
#pragma once

#include "cuda/ptx.h"

namespace gemma2::cuda {

constexpr int kStep = 32;      // k of two instructions
constexpr int kSegment = 256;  // k of a chain
constexpr int kStage = 64;     // k of a tile in shared memory, whose rows are 128 bytes

// sum[16 x 8] += W[16 x 32] x[8 x 32]^T. A lane has numbers 8 (lane % 4) to 8 (lane % 4) + 7 of
// rows lane / 4 (`low`) and lane / 4 + 8 (`high`) of W and lane / 4 of x; of the sum, columns 2
// (lane % 4) and the next of row lane / 4, then of row lane / 4 + 8.
template <typename T>
GEMMA2_DEVICE void add_step(float (&sum)[4], const uint4& low, const uint4& high, const uint4& x) {
  mma_16x8x16<T>(sum, {low.x, high.x, low.y, high.y}, {x.x, x.y});
  mma_16x8x16<T>(sum, {low.z, high.z, low.w, high.w}, {x.z, x.w});
}

// Where 16 bytes of a row lie in a tile of 64 k, so that the 8 chunks that neighbouring lanes copy,
// one row's, lie in different banks, and so do those that they read, four of each of two rows.
GEMMA2_DEVICE int chunk_offset(int row, int chunk) {
  return row * 128 + (chunk ^ row % 2 * 4) * 16;
}

// A lane's 16 bytes of step `step` (0 or 1) of rows [row, row + 8).
GEMMA2_DEVICE uint4 load_rows_of_8(const unsigned char* tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  return load(
      reinterpret_cast<const uint4*>(tile + chunk_offset(row + lane / 4, step * 4 + lane % 4)));
}

}  // namespace gemma2::cuda
