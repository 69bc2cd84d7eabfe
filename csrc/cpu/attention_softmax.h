// Scores to unnormalised probabilities, one row of a tile at a time: p = exp(cap tanh(scale s /
// cap)).
//
// For 0 < cap <= 64 a capped score lies in [-64, 64], where exp is an ordinary float32 number: no
// maximum is needed, p is final, and sums over tiles just add. Otherwise the online form with a
// running maximum. About 50 instructions a vector, one of them a division: a tenth of the products'
// time at head_dim 256.
#pragma once

#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLog2EExact = 1.44269504088896340736;
constexpr float kInfinity = __builtin_inff();

// p = 2^(exp2_scale tanh(tanh_scale s)), or without a cap 2^(exp2_scale s).
struct SoftmaxScales {
  float tanh_scale, exp2_scale;
  float exp2_scale_rest;  // exp2_scale in double, less exp2_scale
  float exp2_scale_high;  // its upper 12 bits
  bool capped;
  SoftmaxScales(float scale, float softcap) : tanh_scale(scale / softcap), capped(softcap > 0) {
    const double exact = (capped ? (double)softcap : (double)scale) * kLog2EExact;
    exp2_scale = (float)exact;
    exp2_scale_rest = (float)(exact - (double)exp2_scale);
    const float shifted = exp2_scale * 4097.f;  // Veltkamp's split
    exp2_scale_high = shifted - (shifted - exp2_scale);
  }
};

// r 2^n for integral n that keep the result an ordinary number (AVX-512: any n).
inline vf32 times_power_of_two(vf32 r, vf32 n_plus_magic, vf32 n) {
#if defined(__AVX512F__)
  (void)n_plus_magic;
  return (vf32)_mm512_scalef_ps((__m512)r, (__m512)n);
#else
  (void)n;
  return r * (vf32)(((vi32)n_plus_magic + (127 - 0x4b400000)) << 23);
#endif
}

constexpr float kRoundingMagic = 12582912.f;  // 1.5 * 2^23 (bits 0x4b400000): adding it rounds

// 2^f for |f| <= 0.5: the Taylor series of e^(f ln 2) to degree 7, remainder 4e-9 relative.
inline vf32 exp2_fraction(vf32 f) {
  vf32 r = splat(1.525273380405984e-5f);
  r = r * f + 1.5403530393381610e-4f;
  r = r * f + 1.3333558146428443e-3f;
  r = r * f + 9.6181291076284772e-3f;
  r = r * f + 5.5504108664821580e-2f;
  r = r * f + 2.4022650695910072e-1f;
  r = r * f + 6.9314718055994531e-1f;
  return r * f + 1.0f;
}

// tanh within 1 ulp: an odd polynomial (Cephes' tanhf) for |x| < 0.625, 1 - 2 / (e^(2|x|) + 1)
// beyond.
inline vf32 fast_tanh(vf32 x) {
  const vf32 z = x * x;
  vf32 small = splat(-5.70498872745e-3f);
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * (z * x) + x;
  const vf32 magnitude = as_float(as_bits(x) & 0x7fffffff);
  const vf32 a = 12.f < magnitude ? splat(12.f) : magnitude;  // this way round NaN stays
  const vf32 shifted = a * (2 * kLog2E) + kRoundingMagic;
  const vf32 n = shifted - kRoundingMagic;
  const vf32 e = times_power_of_two(exp2_fraction(a * (2 * kLog2E) - n), shifted, n);
  const vf32 large = 1.0f - 2.0f / (e + 1.0f);
  const vf32 signed_large = as_float(as_bits(large) | (as_bits(x) & 0x80000000));
  return magnitude < 0.625f ? small : signed_large;
}

// 2^(exp2_scale t) for |t| <= 1. The product is never rounded as a whole, only its fraction: at
// cap 50 that is 2e-6 less error in the exponent, more than all the rest.
inline vf32 exp2_scaled(vf32 t, const SoftmaxScales& scales) {
  const vf32 shifted = t * scales.exp2_scale + kRoundingMagic;
  const vf32 n = shifted - kRoundingMagic;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const vf32 f = t * scales.exp2_scale_rest + (t * scales.exp2_scale - n);
#else
  // Twelve bits of each factor multiply exactly.
  const vf32 t_high = as_float(as_bits(t) & 0xfffff000);
  const float low = scales.exp2_scale - scales.exp2_scale_high + scales.exp2_scale_rest;
  const vf32 f =
      (t_high * scales.exp2_scale_high - n) + (t_high * low + (t - t_high) * scales.exp2_scale);
#endif
  return times_power_of_two(exp2_fraction(f), shifted, n);
}

inline vi32 lane_numbers() {
  vi32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Stores p as the product with V wants it, and gives p as it will read it.
inline vf32 keep(float* to, vf32 p) {
  store(to, p);
  return p;
}
#if defined(__AVX512BF16__)
inline vf32 keep(bf16_t* to, vf32 p) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)p);
  _mm256_storeu_si256((__m256i*)to, half);
  return (vf32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
#endif

// One row: scores s[begin, end) to p. Whole vectors are read and written; in them, other keys get p
// = 0. l: kLanes partial sums of p as kept, which normalise, then kLanes of p as computed, for the
// lse.
template <typename P>
inline void probabilities(const SoftmaxScales& scales, const float* s, P* p, int begin, int end,
                          float* l) {
  const vi32 lanes = lane_numbers();
  vf32 sum = load(l), exact = load(l + kLanes);
  for (int j = begin / kLanes * kLanes; j < end; j += kLanes) {
    vf32 x = exp2_scaled(fast_tanh(load(s + j) * scales.tanh_scale), scales);
    if (j < begin || j + kLanes > end) {
      const vi32 key = lanes + j;
      x = ((key >= begin) & (key < end)) ? x : splat(0.f);
    }
    sum += keep(p + j, x);
    exact += x;
  }
  store(l, sum);
  store(l + kLanes, exact);
}

// The same with a running maximum m (of base-2 exponents). Gives the factor by which earlier sums
// shrink.
template <typename P>
inline float probabilities_online(const SoftmaxScales& scales, float* s, P* p, int begin, int end,
                                  float* l, float* m) {
  const vi32 lanes = lane_numbers();
  vf32 highest = splat(*m);
  for (int j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const vi32 key = lanes + j;
    vf32 x = load(s + j);
    if (scales.capped) x = fast_tanh(x * scales.tanh_scale);
    x *= scales.exp2_scale;
    x = ((key >= begin) & (key < end)) ? x : splat(-kInfinity);
    store(s + j, x);
    highest = vmax(x, highest);
  }
  const float m_new = reduce_max(highest);
  const float offset = m_new == -kInfinity ? 0.f : m_new;
  const float shrink = *m == m_new ? 1.f : exp2(splat(*m - offset))[0];
  vf32 sum = load(l) * shrink, exact = load(l + kLanes) * shrink;
  for (int j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const vf32 x = exp2(load(s + j) - offset);
    sum += keep(p + j, x);
    exact += x;
  }
  store(l, sum);
  store(l + kLanes, exact);
  *m = m_new;
  return shrink;
}

}  // namespace
}  // namespace gemma2::GEMMA2_ISA
