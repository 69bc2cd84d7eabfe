// The product shared by attention and linear: C[m, n] (+)= A[m, k] B[k, n] on
// float32 vectors.
//
// B lies in panels of kPanel columns, one row of a panel after the other; A is
// row-major. A tile of kTileRows x kPanel of C stays in registers: 6 x 4
// vectors with AVX-512 (24 of 32 registers), 6 x 2 elsewhere (12 of 16). Per
// step of k that is 24 FMA for 4 loads and 6 broadcasts. Every element of C is
// summed over k in order, whatever m is: a row's bits do not depend on its
// neighbours.
#pragma once

#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kPanel = kTileVectors * kLanes; // columns of a panel: 64, 16 or 8

template <int kRows>
inline void panel_product_rows(int64_t k, const float *a, int64_t a_stride,
                               const float *b, float *c, int64_t c_stride,
                               bool accumulate) {
  vf32 sum[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v)
      sum[r][v] = accumulate ? load(c + r * c_stride + v * kLanes) : vf32{};
  for (int64_t i = 0; i < k; ++i) {
    vf32 column[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v)
      column[v] = load(b + i * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf32 x = splat(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v)
        sum[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v)
      store(c + r * c_stride + v * kLanes, sum[r][v]);
}

// C[rows, kPanel] (+)= A[rows, k] B[k, kPanel] for 1 <= rows <= kTileRows.
inline void panel_product(int64_t rows, int64_t k, const float *a,
                          int64_t a_stride, const float *b, float *c,
                          int64_t c_stride, bool accumulate) {
  switch (rows) {
  case 1:
    return panel_product_rows<1>(k, a, a_stride, b, c, c_stride, accumulate);
  case 2:
    return panel_product_rows<2>(k, a, a_stride, b, c, c_stride, accumulate);
  case 3:
    return panel_product_rows<3>(k, a, a_stride, b, c, c_stride, accumulate);
  case 4:
    return panel_product_rows<4>(k, a, a_stride, b, c, c_stride, accumulate);
  case 5:
    return panel_product_rows<5>(k, a, a_stride, b, c, c_stride, accumulate);
  default:
    return panel_product_rows<6>(k, a, a_stride, b, c, c_stride, accumulate);
  }
}
static_assert(kTileRows == 6, "one case per number of rows");

// Transposes kLanes x kLanes in registers: swaps blocks of 1, 2, 4 ... lanes
// between rows that far apart.
inline void transpose(vf32 (&row)[kLanes]) {
#pragma GCC unroll 4
  for (int s = 1; s < kLanes; s *= 2) {
    vi32 low, high; // lane l of the pair's first and second row, as indices
                    // into (a, b)
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      low[l] = (l & s) == 0 ? l : kLanes + l - s;
      high[l] = (l & s) == 0 ? l + s : kLanes + l;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & s) != 0)
        continue;
      const vf32 a = row[i], b = row[i + s];
#if defined(__clang__)
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        row[i][l] = (l & s) == 0 ? a[l] : b[l - s];
        row[i + s][l] = (l & s) == 0 ? a[l + s] : b[l];
      }
#else
      row[i] = __builtin_shuffle(a, b, low);
      row[i + s] = __builtin_shuffle(a, b, high);
#endif
    }
  }
}

} // namespace
} // namespace gemma2::GEMMA2_ISA
