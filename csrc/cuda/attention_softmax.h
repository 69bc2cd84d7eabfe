// Scores to unnormalised probabilities, in the registers where the tensor cores leave the former
// and want the latter: p = exp(cap tanh(scale s / cap)).
//
// For 0 < cap <= 64 a capped score lies in [-64, 64], where exp is an ordinary number of float32
// and bfloat16: no maximum is needed, p is final, and sums over tiles just add. Otherwise, and for
// float16, the online form with a running maximum.
//
// cap tanh(x) = cap - 2 cap / (1 + e^(2x)): two exp2 and one reciprocal a score, an absolute error
// of about 1e-7 cap. tanh.approx would save one of the three and err by up to 2^-11 cap. What that
// does to the result (mean errors of 64 rows, 1024 keys, head_dim 128, cap 50; the approximate
// functions with random errors of their documented size; python -m tests.cuda.cap_error):
//
//   scores before the cap           to 4     to 20    to 160   all near 150
//   bfloat16, eager torch           3.1e-4   9.3e-3   1.7e-2   8.5e-5
//   bfloat16, this form             9.1e-5   8.2e-4   4.8e-4   4.7e-5
//   bfloat16, tanh.approx           9.6e-5   1.2e-3   2.8e-3   3.5e-4
//   float16, eager torch            4.3e-5   1.4e-3   2.2e-3   7.8e-5
//   float16, this form              1.1e-5   9.4e-5   5.5e-5   5.5e-6
//   float16, tanh.approx            2.9e-5   8.0e-4   2.8e-3   3.5e-4
//
// The budget is eager's error: tanh.approx keeps it in bfloat16 by a factor of 3 to 8 but for rows
// whose keys all lie at the cap, and breaks it in float16. What would count for it: an SM has 16
// special functions a cycle, so three a score take three quarters of the time of the products at
// head_dim 256 and one and a half times that at 128, at the peak of an H100's tensor cores; two
// would take a half and the whole.
#pragma once

#include <math.h>

#include "common/mutate.h"
#include "cuda/ptx.h"

namespace gemma2::cuda {

constexpr double kLog2E = 1.44269504088896340736;
constexpr float kLn2 = 0.693147180559945309f;

// The exponent of 2 of a score s: exp2_scale tanh(s scale / cap), or without a cap exp2_scale s.
struct SoftmaxScales {
  float tanh_scale;  // 2 log2(e) scale / cap
  float exp2_scale;
  bool capped;
};
inline SoftmaxScales softmax_scales(float scale, float softcap) {
  SoftmaxScales s = {};
  s.capped = softcap > 0;
  s.exp2_scale = static_cast<float>((s.capped ? double{softcap} : double{scale}) * kLog2E);
  if (s.capped) s.tanh_scale = static_cast<float>(2 * kLog2E * double{scale} / double{softcap});
  return s;
}
// Whether sums need no running maximum.
inline bool bounded_by(float softcap) { return softcap > 0 && softcap <= 64; }

GEMMA2_DEVICE float capped_exponent(float s, const SoftmaxScales& scales) {
  // The divisor may be infinite or beyond 2^126: the quotient is 0 there, too.
  const float e = exp2_approx(s * scales.tanh_scale);
  return scales.exp2_scale - __fdividef(2 * scales.exp2_scale, 1 + e);
}

// What a thread keeps of two rows of the fragment of 16: sums of its own columns, and, online, the
// maximum of all.
struct SoftmaxState {
  float l[2];      // of p as it was rounded: what normalises
  float exact[2];  // of p before: for the log-sum-exp
  float m[2];      // of exponents of 2
};
GEMMA2_DEVICE SoftmaxState softmax_start() { return {{0, 0}, {0, 0}, {-INFINITY, -INFINITY}}; }

// Both elements of a word, as they were rounded.
template <typename T>
GEMMA2_DEVICE float sum_of_rounded(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)}) + to_float(T{static_cast<uint16_t>(word >> 16)});
}

// The keys of a tile that this thread's two rows see: row i those in [begin[i], end[i]).
struct SeenKeys {
  int begin[2], end[2];
};

// Scores of kBlocks blocks of 16 rows x 8 keys, as accumulators of mma, to p as operands A. Gives
// in `shrink` the factors of what was summed before; without kOnline they are not touched. With
// kMasked, keys that a row does not see get p = 0.
template <typename T, bool kOnline, bool kMasked, int kBlocks>
GEMMA2_DEVICE void probabilities(float (&s)[kBlocks][4], uint32_t (&p)[kBlocks / 2][4],
                                 SoftmaxState& state, const SoftmaxScales& scales,
                                 const SeenKeys& seen, float (&shrink)[2]) {
  // Of the first of the thread's keys.
  const int column = threadIdx.x % 4 * 2;
  const int begin[2] = {seen.begin[0] - column, seen.begin[1] - column};
  const int end[2] = {seen.end[0] - column, seen.end[1] - column};
  const auto visible = [&](int block, int e) {
    const int key = block * 8 + e % 2;
    return key >= begin[e / 2] && key < end[e / 2];
  };
  float offset[2] = {0, 0};
  if (!kOnline || scales.capped) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[block][e] = capped_exponent(s[block][e], scales);
  } else {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[block][e] *= scales.exp2_scale;
  }
  if constexpr (kOnline) {
    float highest[2] = {state.m[0], state.m[1]};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (kMasked && !visible(block, e)) s[block][e] = -INFINITY;
        highest[e / 2] = fmaxf(highest[e / 2], s[block][e]);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = fmaxf(highest[i], shuffle_xor(highest[i], 1));
      highest[i] = fmaxf(highest[i], shuffle_xor(highest[i], 2));
      // -inf: nothing seen yet, or nothing but NaN.
      offset[i] = highest[i] == -INFINITY ? 0.0f : highest[i];
      shrink[i] = state.m[i] == highest[i] ? 1.0f : exp2_approx(state.m[i] - offset[i]);
      state.m[i] = highest[i];
      state.l[i] *= shrink[i];
      state.exact[i] *= shrink[i];
    }
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = exp2_approx(s[block][2 * i + e] - offset[i]);
        if (!kOnline && kMasked && !visible(block, 2 * i + e)) x[e] = 0;
      }
      const uint32_t word = pack2<T>(x[0], x[1]);
      state.exact[i] += x[0] + x[1];
      state.l[i] += sum_of_rounded<T>(word);
      p[block / 2][block % 2 * 2 + i] = word;
    }
}

// The sums of whole rows.
GEMMA2_DEVICE void finish(SoftmaxState& state) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      state.l[i] += shuffle_xor(state.l[i], bits);
      state.exact[i] += shuffle_xor(state.exact[i], bits);
    }
}

// Of a row: `sum` of p as it was rounded, `exact` before, relative to 2^most.
GEMMA2_DEVICE float log_sum_exp(float sum, float exact, float most) {
  if (mutated(Mutation::lse_from_rounded)) exact = sum;
  if (mutated(Mutation::lse_without_maximum)) most = 0;
  return logf(exact) + most * kLn2;
}

}  // namespace gemma2::cuda
