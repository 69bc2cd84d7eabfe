// linear: out[m, n] = sum_k x[m, k] weight[n, k], accumulated in float32,
// rounded once.
//
// Both matrices are row-major with k innermost, so products run along k without
// repacking: a tile of a few rows of x and a few of weight keeps one vector of
// partial sums per element, and the lanes are added at the end. Every element
// is summed in the same order whatever m is: a row's bits do not depend on the
// batch.
//
// Few rows (decode): weights are streamed once and widened in registers;
// bandwidth is the limit. More rows: 16-bit weights are widened into a scratch
// of at most 512 KB that stays in the cache for all rows of x, except where
// bf16 dot products read them as they are.
//
// Called by gemma2/ops/linear.py; reference: gemma2/reference.py.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// Rows of x and of weight in a tile. Few rows of x take more of weight: each is
// a stream from memory.
#if defined(__AVX512F__)
constexpr int kRows = 5, kColumns = 5;
#else
constexpr int kRows = 3, kColumns = 3;
#endif
constexpr int kStreams = 8;                       // rows of weight in a tile when x has one row
constexpr int64_t kBlockFloats = 512 * 1024 / 4;  // widened weights of a block
constexpr int64_t kWideX = 16 * 1024 * 1024 / 4;  // widened rows of x at a time

// How kStep elements of x and weight, as X and W, meet: float32 FMA after
// widening.
template <typename X, typename W>
struct Widened {
  using XType = X;
  using WType = W;
  using XVector = vf32;
  using WVector = vf32;
  static constexpr int kStep = kLanes;
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
template <int kM, int kN, typename F, typename Out>
void tile(const typename F::XType* x, int64_t x_stride, const typename F::WType* w,
          int64_t w_stride, int64_t k, Out* out, int64_t out_stride) {
  vf32 sum[kM][kN] = {};
  int64_t i = 0;
  for (; i + F::kStep <= k; i += F::kStep) {
    typename F::XVector a[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) a[m] = F::load_x(x + m * x_stride + i);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      const typename F::WVector b = F::load_w(w + n * w_stride + i);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) sum[m][n] = F::add(sum[m][n], a[m], b);
    }
  }
  if (i < k) {
    typename F::XType last_x[kM][F::kStep] = {};
    for (int m = 0; m < kM; ++m)
      memcpy(last_x[m], x + m * x_stride + i, (k - i) * sizeof(typename F::XType));
    for (int n = 0; n < kN; ++n) {
      typename F::WType last_w[F::kStep] = {};
      memcpy(last_w, w + n * w_stride + i, (k - i) * sizeof(typename F::WType));
      const typename F::WVector b = F::load_w(last_w);
      for (int m = 0; m < kM; ++m) sum[m][n] = F::add(sum[m][n], F::load_x(last_x[m]), b);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) store_one(out + m * out_stride + n, reduce_add(sum[m][n]));
}

// All rows of weight in [0, rows) against kM rows of x.
template <int kM, int kN, typename F, typename Out>
void strip(const typename F::XType* x, int64_t x_stride, const typename F::WType* w,
           int64_t w_stride, int64_t rows, int64_t k, Out* out, int64_t out_stride) {
  int64_t n = 0;
  for (; n + kN <= rows; n += kN)
    tile<kM, kN, F>(x, x_stride, w + n * w_stride, w_stride, k, out + n, out_stride);
  for (; n < rows; ++n)
    tile<kM, 1, F>(x, x_stride, w + n * w_stride, w_stride, k, out + n, out_stride);
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
    strip<kRows, kColumns, F>(x + i * xs, xs, w, ws, rows, k, out + i * out_stride, out_stride);
  const auto* rest = x + i * xs;
  Out* to = out + i * out_stride;
  switch (m - i) {
    case 1:
      return strip<1, kStreams, F>(rest, xs, w, ws, rows, k, to, out_stride);
    case 2:
      return strip<2, kColumns, F>(rest, xs, w, ws, rows, k, to, out_stride);
    case 3:
      return strip<3, kColumns, F>(rest, xs, w, ws, rows, k, to, out_stride);
    case 4:
      return strip<4, kColumns, F>(rest, xs, w, ws, rows, k, to, out_stride);
  }
}

template <typename T>
void widen(const T* from, int64_t from_stride, int64_t rows, int64_t k, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for_lanes(k, [&](int64_t i, int64_t lanes) {
      store_upto(to + r * k + i, load_upto(from + r * from_stride + i, lanes), lanes);
    });
}

// F reads x and weight as they lie.
template <typename F, typename Out>
void run_direct(const LinearParams& p, const Operand& x, int64_t m, Out* out) {
  using W = typename F::WType;
  // Pieces of N that a thread takes at a time: whole tiles, enough work to be
  // worth a thread.
  const int64_t piece = 40;
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
  int64_t rows = kBlockFloats / max64(p.k, 1) / kColumns * kColumns;
  rows = min64(max64(rows, kColumns), 8 * kColumns);
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

template <typename T>
void run(const LinearParams& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t piece = max64(1, min64(p.m, kWideX / max64(p.k, 1)));
  const Scratch wide(piece * p.k);
  for (int64_t first = 0; first < p.m; first += piece) {
    const int64_t m = min64(piece, p.m - first);
    parallel(m, 1 + 16384 / (p.k + 1), [&](int64_t begin, int64_t end) {
      widen(x + (first + begin) * p.x_stride, p.x_stride, end - begin, p.k,
            wide.get() + begin * p.k);
    });
    if (m <= kRows)
      run_direct<Widened<float, T>>(p, {wide.get(), p.k}, m, out + first * p.n);
    else
      run_widened<T>(p, wide.get(), m, out + first * p.n);
  }
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  switch (p.dtype) {
    case DType::f32:
      return run_direct<Widened<float, float>>(p, {p.x, p.x_stride}, p.m,
                                               static_cast<float*>(p.out));
    case DType::bf16:
#if defined(__AVX512BF16__)
      return run_direct<Bf16Pairs>(p, {p.x, p.x_stride}, p.m, static_cast<bf16_t*>(p.out));
#else
      return run<bf16_t>(p);
#endif
    case DType::f16:
      return run<f16_t>(p);
  }
}

}  // namespace gemma2::GEMMA2_ISA
