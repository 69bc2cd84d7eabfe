// Tiles of rows in shared memory for the tensor cores, and the fragments that come out of them.
//
// A row is head_dim numbers of 16 bits; its chunks of 16 bytes lie exclusive-ored with the row's
// number mod 8. So the 8 rows of a matrix that ldmatrix reads, and the 8 chunks that neighbouring
// lanes copy, lie in different banks.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of A, 16 rows x 16 columns, four
// matrices of 8x8, rows first; of B, 16 x 8, two.
#pragma once

#include "cuda/ptx.h"

namespace gemma2::cuda {

// Of rows of kDim numbers of 16 bits.
template <int kDim>
struct TileRows {
  static constexpr int kChunks = kDim / 8, kBytes = 2 * kDim;
  static_assert(kChunks % 8 == 0, "the banks hold 8 chunks");
};

template <int kDim>
GEMMA2_DEVICE int tile_offset(int row, int chunk) {  // in bytes
  return row * TileRows<kDim>::kBytes + (chunk ^ (row & 7)) * 16;
}

// A of rows [row, row + 16), numbers [16 step, 16 step + 16) of each.
template <int kDim>
GEMMA2_DEVICE void load_rows(uint32_t (&a)[4], const unsigned char* tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(a, tile + tile_offset<kDim>(row + lane % 16, 2 * step + lane / 16));
}

// B of two products against rows of a tile: keys [key, key + 8) and the 8 after them, numbers [16
// step, 16 step + 16).
template <int kDim>
GEMMA2_DEVICE void load_keys(uint32_t (&first)[2], uint32_t (&second)[2], const unsigned char* tile,
                             int key, int step) {
  const int lane = threadIdx.x % kWarp;
  uint32_t b[4];
  ldmatrix(b, tile + tile_offset<kDim>(key + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  first[0] = b[0];
  first[1] = b[1];
  second[0] = b[2];
  second[1] = b[3];
}

// B of two products with rows of a tile: columns [16 step, 16 step + 8) and the 8 after them, keys
// [key, key + 16).
template <int kDim>
GEMMA2_DEVICE void load_values(uint32_t (&first)[2], uint32_t (&second)[2],
                               const unsigned char* tile, int key, int step) {
  const int lane = threadIdx.x % kWarp;
  uint32_t b[4];
  ldmatrix_transposed(b, tile + tile_offset<kDim>(key + lane % 16, 2 * step + lane / 16));
  first[0] = b[0];
  first[1] = b[1];
  second[0] = b[2];
  second[1] = b[3];
}

}  // namespace gemma2::cuda
