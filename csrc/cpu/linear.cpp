// linear: out[m, n] = sum_k x[m, k] weight[n, k], accumulated in float32, rounded once.
//
// Both matrices are row-major with k innermost, so products run along k without repacking: a tile
// of a few rows of x and a few of weight keeps one vector of partial sums per element, and the
// lanes are added at the end. Every element is summed in the same order whatever m is: a row's bits
// do not depend on the batch.
//
// Few rows (decode): weights are streamed once and widened in registers; bandwidth is the limit.
// More rows, 256 at a time: a block of weights of at most 512 KB stays in the cache for all of
// them, 16-bit ones widened first, except where bf16 dot products read them as they are.
//
// Measured on one core of an EPYC (Zen 4), 9216 x 2304, machine shared, 2026-11-24: one row reads
// float32 at 20 GB/s and bfloat16 at 15 to 16 (both cores together can read 34); 256 rows make 102
// of 117 GFLOP/s in float32 and 174 of 235 in bfloat16 (AVX-512), 86 of 117 (AVX2, either dtype).
//
// Called by gemma2/ops/linear.py; reference: gemma2/reference.py.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// Rows of x and of weight in a tile, as many sums as registers hold. Up to kRows rows of x come
// with fewer sums, but each row of weight is a stream from memory: kColumnsOf[m] of them.
#if defined(__AVX512F__)
constexpr int kRows = 5, kColumns = 5;
constexpr int kColumnsOf[] = {0, 8, 8, 6, 5};
#else
constexpr int kRows = 3, kColumns = 4;
constexpr int kColumnsOf[] = {0, 8, 6, 4, 3};
#endif
constexpr int64_t kAhead = 512;              // bytes between a weight that is read and one fetched
constexpr int64_t kBlockBytes = 512 * 1024;  // weights of a block, widened if they are
constexpr int64_t kMaxRows = 256;  // rows of x at a time: they too should stay in the cache
constexpr int64_t kMaxWide = 16 * 1024 * 1024 / 4;  // floats of them, where they are widened

// How kStep elements of x and weight, as X and W, meet: float32 FMA after widening. A lane sums
// kChain steps, then they join the total: the sums stay smaller, and so do their roundings.
template <typename X, typename W>
struct Widened {
  using XType = X;
  using WType = W;
  using XVector = vf32;
  using WVector = vf32;
  static constexpr int kStep = kLanes;
  static constexpr int kChain = 64;
  static XVector load_x(const X* p) { return load(p); }
  static WVector load_w(const W* p) { return load(p); }
  static vf32 add(vf32 sum, XVector x, WVector w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 products added to float32 by vdpbf16ps.
struct Bf16Pairs {
  using XType = bf16_t;
  using WType = bf16_t;
  using XVector = __m512bh;
  using WVector = __m512bh;
  static constexpr int kStep = 2 * kLanes;
  static constexpr int kChain = 256;
  static __m512bh load_x(const bf16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh load_w(const bf16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf32 add(vf32 sum, __m512bh x, __m512bh w) {
    return (vf32)_mm512_dpbf16_ps((__m512)sum, x, w);
  }
};
#endif

struct Operand {
  const void* data;
  int64_t stride;  // elements
};

// out[m, n] for kM rows of x and kN of weight; rows of out are out_stride
// apart.
template <int kM, int kN, bool kFetch, typename F, typename Out>
void tile(const typename F::XType* x, int64_t x_stride, const typename F::WType* w,
          int64_t w_stride, int64_t k, Out* out, int64_t out_stride) {
  vf32 total[kM][kN] = {};
  int64_t i = 0;
  while (i + F::kStep <= k) {
    vf32 sum[kM][kN] = {};
    const int64_t end = min64(k - F::kStep + 1, i + F::kChain * F::kStep);
    for (; i < end; i += F::kStep) {
      typename F::XVector a[kM];
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) a[m] = F::load_x(x + m * x_stride + i);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        const typename F::WVector b = F::load_w(w + n * w_stride + i);
        if (kFetch && i * sizeof(typename F::WType) % 64 == 0)
          __builtin_prefetch(reinterpret_cast<const char*>(w + n * w_stride + i) + kAhead);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) sum[m][n] = F::add(sum[m][n], a[m], b);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) total[m][n] += sum[m][n];
  }
  if (i < k) {
    typename F::XType last_x[kM][F::kStep] = {};
    for (int m = 0; m < kM; ++m)
      memcpy(last_x[m], x + m * x_stride + i, (k - i) * sizeof(typename F::XType));
    for (int n = 0; n < kN; ++n) {
      typename F::WType last_w[F::kStep] = {};
      memcpy(last_w, w + n * w_stride + i, (k - i) * sizeof(typename F::WType));
      const typename F::WVector b = F::load_w(last_w);
      for (int m = 0; m < kM; ++m) total[m][n] = F::add(total[m][n], F::load_x(last_x[m]), b);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) store_one(out + m * out_stride + n, reduce_add(total[m][n]));
}

// All rows of weight in [0, rows) against kM rows of x.
template <int kM, int kN, bool kFetch, typename F, typename Out>
void strip(const typename F::XType* x, int64_t x_stride, const typename F::WType* w,
           int64_t w_stride, int64_t rows, int64_t k, Out* out, int64_t out_stride) {
  int64_t n = 0;
  for (; n + kN <= rows; n += kN)
    tile<kM, kN, kFetch, F>(x, x_stride, w + n * w_stride, w_stride, k, out + n, out_stride);
  for (; n < rows; ++n)
    tile<kM, 1, kFetch, F>(x, x_stride, w + n * w_stride, w_stride, k, out + n, out_stride);
}

// out[m, rows] = x[m, k] w[rows, k]^T for a block of weight that is in the
// cache, or is read once (m small).
template <typename F, typename Out>
void block(const Operand& x_operand, const Operand& w_operand, int64_t m, int64_t rows, int64_t k,
           Out* out, int64_t out_stride) {
  const auto* x = static_cast<const typename F::XType*>(x_operand.data);
  const auto* w = static_cast<const typename F::WType*>(w_operand.data);
  const int64_t xs = x_operand.stride, ws = w_operand.stride;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    strip<kRows, kColumns, false, F>(x + i * xs, xs, w, ws, rows, k, out + i * out_stride,
                                     out_stride);
  const auto* rest = x + i * xs;
  Out* to = out + i * out_stride;
  switch (m - i) {
    case 1:
      return strip<1, kColumnsOf[1], true, F>(rest, xs, w, ws, rows, k, to, out_stride);
    case 2:
      return strip<2, kColumnsOf[2], true, F>(rest, xs, w, ws, rows, k, to, out_stride);
    case 3:
      return strip<3, kColumnsOf[3], true, F>(rest, xs, w, ws, rows, k, to, out_stride);
    case 4:
      return strip<4, kColumnsOf[4], true, F>(rest, xs, w, ws, rows, k, to, out_stride);
  }
}

template <typename T>
void widen(const T* from, int64_t from_stride, int64_t rows, int64_t k, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for_lanes(k, [&](int64_t i, int64_t lanes) {
      store_upto(to + r * k + i, load_upto(from + r * from_stride + i, lanes), lanes);
    });
}

// Rows of weight, `bytes` each, that stay in the cache for all rows of x.
inline int64_t block_rows(int64_t bytes) {
  return min64(max64(kBlockBytes / max64(bytes, 1) / kColumns, 1), 8) * kColumns;
}

// F reads x and weight as they lie.
template <typename F, typename Out>
void run_direct(const LinearParams& p, const Operand& x, int64_t m, Out* out) {
  using W = typename F::WType;
  // What a thread takes at a time. Few rows of x: whole tiles of every kind, and nothing to keep.
  const int64_t piece = m <= kRows ? 120 : block_rows(p.k * (int64_t)sizeof(W));
  const int64_t pieces = (p.n + piece - 1) / piece;
  const int64_t grain = max64(1, 32768 / max64(1, piece * p.k * m / 16));
  parallel(pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i * piece;
      block<F>(x, {static_cast<const W*>(p.weight) + n * p.weight_stride, p.weight_stride}, m,
               min64(piece, p.n - n), p.k, out + n, p.n);
    }
  });
}

// 16-bit weights and float32 x of m rows: each block of weights is widened once
// for all of them.
template <typename W>
void run_widened(const LinearParams& p, const float* x, int64_t m, W* out) {
  const int64_t rows = block_rows(p.k * (int64_t)sizeof(float));
  parallel((p.n + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
    const Scratch wide(rows * p.k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i * rows, count = min64(rows, p.n - n);
      widen(static_cast<const W*>(p.weight) + n * p.weight_stride, p.weight_stride, count, p.k,
            wide.get());
      block<Widened<float, float>>({x, p.k}, {wide.get(), p.k}, m, count, p.k, out + n, p.n);
    }
  });
}

// body(first row, rows) for all rows of x.
template <typename F>
inline void by_rows(int64_t m, int64_t most, const F& body) {
  for (int64_t first = 0; first < m; first += most) body(first, min64(most, m - first));
}

template <typename F, typename T>
void run_as_it_lies(const LinearParams& p) {
  by_rows(p.m, kMaxRows, [&](int64_t first, int64_t m) {
    run_direct<F>(p, {static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride}, m,
                  static_cast<T*>(p.out) + first * p.n);
  });
}

template <typename T>
void run_after_widening(const LinearParams& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t most = max64(1, min64(min64(p.m, kMaxRows), kMaxWide / max64(p.k, 1)));
  const Scratch wide(most * p.k);
  by_rows(p.m, most, [&](int64_t first, int64_t m) {
    parallel(m, 1 + 16384 / (p.k + 1), [&](int64_t begin, int64_t end) {
      widen(x + (first + begin) * p.x_stride, p.x_stride, end - begin, p.k,
            wide.get() + begin * p.k);
    });
    if (m <= kRows)
      run_direct<Widened<float, T>>(p, {wide.get(), p.k}, m, out + first * p.n);
    else
      run_widened<T>(p, wide.get(), m, out + first * p.n);
  });
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  switch (p.dtype) {
    case DType::f32:
      return run_as_it_lies<Widened<float, float>, float>(p);
    case DType::bf16:
#if defined(__AVX512BF16__)
      return run_as_it_lies<Bf16Pairs, bf16_t>(p);
#else
      return run_after_widening<bf16_t>(p);
#endif
    case DType::f16:
      return run_after_widening<f16_t>(p);
  }
}

}  // namespace gemma2::GEMMA2_ISA
