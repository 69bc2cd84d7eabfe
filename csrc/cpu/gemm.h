// The product of attention: C[m, n] += A[m, k] B[k, n] with float32 sums, on words of 32 bits.
//
// A word is one float32, or two bfloat16 that belong together in one dot product (vdpbf16ps): k
// counts words. B lies in panels of kPanel columns, one row of a panel after the other; A is
// row-major. A tile of kTileRows x kPanel of C stays in registers: 6 x 4 vectors with AVX-512 (24
// of 32 registers), 6 x 2 elsewhere (12 of 16). Per step of k that is 24 FMA for 4 loads and 6
// broadcasts. Every element is summed over k in order, from zero, and then added to C: a row's bits
// do not depend on its neighbours, and a long k taken in pieces loses less than one long
// chain would.
//
// Measured at k = 64, C in the cache, AVX-512 on an EPYC (Zen 4), one core: 110 of 117 GFLOP/s.
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
constexpr int kPanel = kTileVectors * kLanes;  // columns of a panel: 64, 16 or 8

// One float32 in a word. kChain: words of a long k that should be summed at a time.
struct Single {
  static constexpr int kPerWord = 1;
#if defined(__FMA__)
  static constexpr int64_t kChain = 32;
#else
  static constexpr int64_t kChain = 16;  // products are rounded, too
#endif
  static vf32 add(vf32 sum, float a, vf32 b) { return sum + splat(a) * b; }
};

#if defined(__AVX512BF16__)
// Two bfloat16 in a word.
struct Bf16Pair {
  static constexpr int kPerWord = 2;
  static constexpr int64_t kChain = 64;
  static vf32 add(vf32 sum, float a, vf32 b) {
    return (vf32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(a), (__m512bh)b);
  }
};
#endif

template <typename Word, int kRows, int kVectors>
__attribute__((noinline)) void panel_product_tile(int64_t k, const float* a, int64_t a_stride,
                                                  const float* b, float* c, int64_t c_stride,
                                                  bool add_to_c) {
  vf32 sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < k; ++i) {
    vf32 column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + i * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float x = a[r * a_stride + i];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Word::add(sum[r][v], x, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, add_to_c ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <typename Word, int kVectors>
inline void panel_product_rows(int64_t rows, int64_t k, const float* a, int64_t a_stride,
                               const float* b, float* c, int64_t c_stride, bool add_to_c) {
  static_assert(kTileRows == 6, "one case per number of rows");
  switch (rows) {
    case 1:
      return panel_product_tile<Word, 1, kVectors>(k, a, a_stride, b, c, c_stride, add_to_c);
    case 2:
      return panel_product_tile<Word, 2, kVectors>(k, a, a_stride, b, c, c_stride, add_to_c);
    case 3:
      return panel_product_tile<Word, 3, kVectors>(k, a, a_stride, b, c, c_stride, add_to_c);
    case 4:
      return panel_product_tile<Word, 4, kVectors>(k, a, a_stride, b, c, c_stride, add_to_c);
    case 5:
      return panel_product_tile<Word, 5, kVectors>(k, a, a_stride, b, c, c_stride, add_to_c);
    default:
      return panel_product_tile<Word, 6, kVectors>(k, a, a_stride, b, c, c_stride, add_to_c);
  }
}

// C[rows, columns] (+)= A[rows, k] B[k, columns], 1 <= rows <= kTileRows; columns, at most kPanel,
// is rounded up to whole vectors.
template <typename Word>
inline void panel_product(int64_t rows, int64_t columns, int64_t k, const float* a,
                          int64_t a_stride, const float* b, float* c, int64_t c_stride,
                          bool add_to_c) {
  static_assert(kTileVectors == 4 || kTileVectors == 2, "one case per number of vectors");
  if (kTileVectors == 4 && columns <= kLanes * 3) {
    if (columns <= kLanes)
      return panel_product_rows<Word, 1>(rows, k, a, a_stride, b, c, c_stride, add_to_c);
    if (columns <= kLanes * 2)
      return panel_product_rows<Word, 2>(rows, k, a, a_stride, b, c, c_stride, add_to_c);
    return panel_product_rows<Word, 3>(rows, k, a, a_stride, b, c, c_stride, add_to_c);
  }
  panel_product_rows<Word, kTileVectors>(rows, k, a, a_stride, b, c, c_stride, add_to_c);
}

// Transposes kLanes x kLanes words in registers: swaps blocks of 1, 2, 4 ... lanes between rows
// that far apart.
inline void transpose(vf32 (&row)[kLanes]) {
#pragma GCC unroll 4
  for (int s = 1; s < kLanes; s *= 2) {
    vi32 low, high;  // lane l of the pair's first and second row, as indices into (a, b)
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      low[l] = (l & s) == 0 ? l : kLanes + l - s;
      high[l] = (l & s) == 0 ? l + s : kLanes + l;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & s) != 0) continue;
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

}  // namespace
}  // namespace gemma2::GEMMA2_ISA
