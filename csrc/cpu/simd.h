// Vectors of float32 for the instruction set that this file is compiled for, as GCC/Clang vector
// types: arithmetic, comparisons and `mask ? a : b` are the language's own, and -ffp-contract=fast
// turns a * b + c into FMA where there is one. Only conversions and reductions name instructions.
//
// Everything is static: a copy of an inline function compiled for AVX-512 must never be linked into
// the portable path. Hence no std headers, and all of it in an anonymous namespace.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "cpu/threads.h"

namespace gemma2::GEMMA2_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

inline vf32 splat(float x) { return x - vf32{}; }
inline vi32 splat_int(int32_t x) { return x - vi32{}; }
inline vf32 as_float(vu32 x) { return (vf32)x; }
inline vu32 as_bits(vf32 x) { return (vu32)x; }

// ---- Loads and stores, widening to and rounding (to nearest even) from float32 ----

inline vf32 load(const float* p) {
  vf32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf32 v) { memcpy(p, &v, sizeof v); }

inline vf32 load(const bf16_t* p) {
  vu16 v;
  memcpy(&v, p, sizeof v);
  return as_float(__builtin_convertvector(v, vu32) << 16);
}
inline void store(bf16_t* p, vf32 v) {
  // Integer arithmetic on purpose, also where vcvtneps2bf16 exists: that one flushes subnormals.
  const vu32 bits = as_bits(v);
  const vu32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu32 quiet_nan = (bits >> 16) | 0x40;
  const vu16 half = __builtin_convertvector(v == v ? rounded : quiet_nan, vu16);
  memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
inline vf32 load(const f16_t* p) {
  return (vf32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store(f16_t* p, vf32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline vf32 load(const f16_t* p) {
  return (vf32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline void store(f16_t* p, vf32 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vf32 load(const f16_t* p) {
  vu16 half;
  memcpy(&half, p, sizeof half);
  const vu32 h = __builtin_convertvector(half, vu32);
  // Exponent re-biased by a multiplication with 2^112, which also normalises subnormals.
  const vf32 magnitude = as_float((h & 0x7fff) << 13) * 0x1p112f;
  const vu32 special = as_bits(magnitude) | 0x7f800000;  // infinity and NaN keep all exponent bits
  const vu32 bits = (h & 0x7c00) == 0x7c00 ? special : as_bits(magnitude);
  return as_float(bits | ((h & 0x8000) << 16));
}
inline void store(f16_t* p, vf32 v) {
  const vu32 bits = as_bits(v);
  const vu32 sign = (bits >> 16) & 0x8000;
  const vu32 magnitude = bits & 0x7fffffff;
  // Normal halves: re-bias and round to even in integers; carries run into the exponent, and on to
  // infinity.
  const vu32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal halves: adding 0.5 lines the half's last bit up with the float's.
  const vu32 subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  vu32 half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? (vu32{} + 0x7c00) : half;
  half = magnitude > 0x7f800000 ? (0x7e00 | ((magnitude >> 13) & 0x3ff)) : half;
  const vu16 out = __builtin_convertvector(half | sign, vu16);
  memcpy(p, &out, sizeof out);
}
#endif

// The first n < kLanes elements; the rest of the vector is 0, the rest of memory untouched.
template <typename T>
inline vf32 load_first(const T* p, int64_t n) {
  T tmp[kLanes] = {};
  memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}
template <typename T>
inline void store_first(T* p, vf32 v, int64_t n) {
  T tmp[kLanes];
  store(tmp, v);
  memcpy(p, tmp, n * sizeof(T));
}

// for_lanes(n, body): body(i, lanes) for i = 0, kLanes, 2 kLanes ...; lanes < kLanes only at the
// end.
template <typename F>
inline void for_lanes(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, (int64_t)kLanes);
  if (i < n) body(i, n - i);
}
template <typename T>
inline vf32 load_upto(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_first(p, n);
}
template <typename T>
inline void store_upto(T* p, vf32 v, int64_t n) {
  if (n == kLanes)
    store(p, v);
  else
    store_first(p, v, n);
}

template <typename T>
inline float load_one(const T* p) {
  return load_first(p, 1)[0];
}
template <typename T>
inline void store_one(T* p, float x) {
  store_first(p, splat(x), 1);
}

// ---- Reductions ----

inline float reduce_add(vf32 v) {
  float sum = 0;
#if defined(__AVX512F__)
  sum = _mm512_reduce_add_ps((__m512)v);
#else
  float tmp[kLanes];
  store(tmp, v);
  for (int stride = kLanes / 2; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) tmp[i] += tmp[i + stride];
  sum = tmp[0];
#endif
  return sum;
}
inline vf32 vmax(vf32 a, vf32 b) { return a > b ? a : b; }
inline vf32 vmin(vf32 a, vf32 b) { return a < b ? a : b; }
// Is any lane of a comparison's result set?
inline bool any(vi32 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t seen = 0;
  for (int i = 0; i < kLanes; ++i) seen |= mask[i];
  return seen != 0;
#endif
}
inline float reduce_max(vf32 v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// ---- Functions, each within 2 ulp of the exact value in float32 ----

// 2^x. Below -126 it gives 0 (no subnormals), above 128 infinity; NaN stays NaN.
inline vf32 exp2(vf32 x) {
  const vf32 clamped = vmin(vmax(x, splat(-127.f)), splat(128.f));
  const vf32 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf32 shifted = clamped + magic;
  const vf32 f = clamped - (shifted - magic);  // [-0.5, 0.5]
  const vi32 n = (vi32)shifted - (vi32)magic;
  // 2^f = exp(f ln 2): the Taylor series to degree 7 has a remainder of 4e-9 relative at |f| = 0.5.
  vf32 r = splat(1.525273380405984e-5f);
  r = r * f + 1.5403530393381610e-4f;
  r = r * f + 1.3333558146428443e-3f;
  r = r * f + 9.6181291076284772e-3f;
  r = r * f + 5.5504108664821580e-2f;
  r = r * f + 2.4022650695910072e-1f;
  r = r * f + 6.9314718055994531e-1f;
  r = r * f + 1.0f;
  // Two steps, so that 2^128 overflows to infinity instead of wrapping.
  const vi32 half = n >> 1;
  const vf32 a = (vf32)((half + 127) << 23), b = (vf32)((n - half + 127) << 23);
  vf32 y = r * a * b;
  y = x < -126.f ? splat(0.f) : y;
  return x == x ? y : x;
}

// e^x = 2^n e^r with r = x - n ln 2 in two parts (Cody and Waite), so that large |x| keeps its
// bits.
inline vf32 exp(vf32 x) {
  const vf32 clamped = vmin(vmax(x, splat(-88.f)), splat(89.f));
  const vf32 magic = splat(12582912.f);
  const vf32 shifted = clamped * 1.44269504088896341f + magic;
  const vf32 nf = shifted - magic;
  const vi32 n = (vi32)shifted - (vi32)magic;
  vf32 r = clamped - nf * 0.693359375f;
  r = r + nf * 2.12194440e-4f;
  vf32 y = splat(1.9841269841e-4f);
  y = y * r + 1.3888888889e-3f;
  y = y * r + 8.3333333333e-3f;
  y = y * r + 4.1666666667e-2f;
  y = y * r + 1.6666666667e-1f;
  y = y * r + 0.5f;
  y = y * (r * r) + r;
  y = y + 1.0f;
  const vi32 half = n >> 1;
  const vf32 a = (vf32)((half + 127) << 23), b = (vf32)((n - half + 127) << 23);
  y = y * a * b;
  y = x < -87.3f ? splat(0.f) : y;
  return x == x ? y : x;
}

// Odd polynomial for |x| < 0.625 (coefficients of Cephes' tanhf), 1 - 2 / (e^(2|x|) + 1) beyond.
inline vf32 tanh(vf32 x) {
  const vf32 z = x * x;
  vf32 p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf32 small = p * z * x + x;
  const vf32 magnitude = as_float(as_bits(x) & 0x7fffffff);
  const vf32 large = 1.0f - 2.0f / (exp(vmin(magnitude, splat(20.f)) * 2.0f) + 1.0f);
  const vf32 signed_large = as_float(as_bits(large) | (as_bits(x) & 0x80000000));
  const vf32 y = magnitude < 0.625f ? small : signed_large;
  return x == x ? y : x;
}

// ln(1 + f) + e ln 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1] and a whole number e; relative to the
// result it is as exact for the smallest f, too. Coefficients of Cephes' logf.
inline vf32 log_1p_scaled(vf32 f, vf32 e) {
  const vf32 z = f * f;
  vf32 p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vf32 y = p * f * z;
  y = y - e * 2.12194440e-4f;  // ln 2 in two parts, as in exp
  y = y - 0.5f * z;
  return (f + y) + e * 0.693359375f;
}

// Natural logarithm. 0 gives -infinity, negative numbers NaN.
inline vf32 log(vf32 x) {
  const vi32 tiny = x < 0x1p-126f;
  const vu32 bits = as_bits(tiny ? x * 0x1p23f : x);
  // Adding the distance from sqrt(1/2) to 1 carries into the exponent exactly when m >= sqrt(2).
  const vu32 shifted = bits + (0x3f800000 - 0x3f3504f3);
  const vf32 e = __builtin_convertvector((vi32)(shifted >> 23) - 127, vf32);
  const vf32 m = as_float((shifted & 0x007fffff) + 0x3f3504f3);  // [sqrt(1/2), sqrt(2))
  vf32 y = log_1p_scaled(m - 1.0f, e - (tiny ? splat(23.f) : splat(0.f)));
  y = x < __builtin_inff() ? y : x;  // infinity and NaN stay
  y = x == 0.f ? splat(-__builtin_inff()) : y;
  return x < 0.f ? splat(__builtin_nanf("")) : y;
}

// ---- Types, threads, memory ----

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<float | bf16_t | f16_t>{}) by the run-time dtype.
template <typename F>
inline void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<bf16_t>{});
    case DType::f16:
      return f(Type<f16_t>{});
  }
}

// body(begin, end) over [0, n) on torch's threads.
template <typename F>
inline void parallel(int64_t n, int64_t grain, const F& body) {
  parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Uninitialised floats, aligned to a cache line, freed at the end of the scope.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
    if (data_ == nullptr) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace gemma2::GEMMA2_ISA
