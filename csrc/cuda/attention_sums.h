// Sums over keys of a row, and how two of them become one.
//
// Deterministic attention closes its sums where a key's position is a multiple of kSumKeys
// (common/attention_plan.h): each is made from nothing, and a row's are merged in ascending order
// by merge() alone. So a row's bits do not depend on who made which sum.
#pragma once

#include "cuda/attention_softmax.h"
#include "cuda/launch.h"

namespace gemma2::cuda {

struct alignas(16) Sums {
  float sum;    // of p as multiplied with v; 0: no key was seen
  float exact;  // of p before it was rounded, for the lse
  float most;   // what p's exponents are relative to; 0 where no maximum is kept
  float unused;
};

// Factors of o in a merge. A part without keys, whose o is 0, leaves the total's bits as they are.
struct Weights {
  float total, part;
};

// `total`, at first all 0, takes in `part`.
GEMMA2_DEVICE Weights merge(Sums& total, const Sums& part) {
  if (part.sum == 0) return {1, 0};  // NaN is not 0
  if (total.sum == 0) {
    total = part;
    return {0, 1};
  }
  const float most = fmaxf(total.most, part.most);
  const float offset = most == -INFINITY ? 0.0f : most;
  const Weights weights = {exp2_approx(total.most - offset), exp2_approx(part.most - offset)};
  total.sum = fmaf(total.sum, weights.total, part.sum * weights.part);
  total.exact = fmaf(total.exact, weights.total, part.exact * weights.part);
  total.most = most;
  return weights;
}
GEMMA2_DEVICE float merged(float total, float part, const Weights& weights) {
  return fmaf(total, weights.total, part * weights.part);
}

// Two elements of the result, in a dtype that is known when the kernel runs.
GEMMA2_DEVICE uint32_t pack_pair(DType dtype, float x, float y) {
  return dtype == DType::bf16 ? pack2<bf16_t>(x, y) : pack2<f16_t>(x, y);
}

// Sums that were made side by side, of rows that are counted query by query.
struct Parts {
  float* o;    // [batch * kv_heads, rows, parts, D]
  Sums* sums;  // [batch * kv_heads, rows, parts]
  int parts;
};

// Gives out and lse from parts: attention_merge.cu.
void attention_merge(const AttentionParams& p, const Parts& parts, CudaCall& call);

// ---- Of a warp's 16 rows, of which a thread has two, in fragments of O ----

// What a thread keeps of its total: a piece for each 8 columns, and of its two rows the sums.
template <int kDim>
constexpr int kTotals = kDim / 8 + 2;

// Merges what was summed since the last time into the thread's `total`, whose pieces lie kStride
// apart, and starts from nothing. The first time, the total is what was summed.
template <int kStride, bool kOnline, int kPieces>
GEMMA2_DEVICE void close_sums(float (&o)[kPieces][4], SoftmaxState& state, float4* total,
                              bool first) {
  constexpr int kAtOnce = 8;
  finish(state);
  Weights weights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Sums* kept = reinterpret_cast<Sums*>(total + (kPieces + i) * kStride);
    Sums sums = {};
    if (!first) sums = load(kept);
    weights[i] = merge(sums, {state.l[i], state.exact[i], kOnline ? state.m[i] : 0.0f, 0});
    store(kept, sums);
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; piece += kAtOnce) {
    float4 x[kAtOnce] = {};
    if (!first)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i] = load(total + (piece + i) * kStride);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float(&part)[4] = o[piece + i];
      x[i] = {merged(x[i].x, part[0], weights[0]), merged(x[i].y, part[1], weights[0]),
              merged(x[i].z, part[2], weights[1]), merged(x[i].w, part[3], weights[1])};
      store(total + (piece + i) * kStride, x[i]);
#pragma unroll
      for (int e = 0; e < 4; ++e) part[e] = 0;
    }
  }
  state = softmax_start();
}

// What close_sums() has merged, in the end.
template <int kStride, int kPieces>
GEMMA2_DEVICE void load_total(float (&o)[kPieces][4], SoftmaxState& state, const float4* total) {
#pragma unroll
  for (int d = 0; d < kPieces; ++d) {
    const float4 x = load(total + d * kStride);
    o[d][0] = x.x;
    o[d][1] = x.y;
    o[d][2] = x.z;
    o[d][3] = x.w;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Sums sums = load(reinterpret_cast<const Sums*>(total + (kPieces + i) * kStride));
    state.l[i] = sums.sum;
    state.exact[i] = sums.exact;
    state.m[i] = sums.most;
  }
}

// Leaves the thread's row `half`, 0 or 1, to attention_merge(): part `part` of the rows' `row`.
template <bool kOnline, int kPieces>
GEMMA2_DEVICE void store_part(const float (&o)[kPieces][4], const SoftmaxState& state, int half,
                              const Parts& parts, int64_t row, uint32_t part) {
  const int quarter = threadIdx.x % 4;
  const int64_t at = row * parts.parts + part;
#pragma unroll
  for (int d = 0; d < kPieces; ++d)
    store(reinterpret_cast<float2*>(parts.o + (at * kPieces + d) * 8) + quarter,
          float2{o[d][2 * half], o[d][2 * half + 1]});
  if (quarter == 0)
    store(parts.sums + at,
          Sums{state.l[half], state.exact[half], kOnline ? state.m[half] : 0.0f, 0});
}

}  // namespace gemma2::cuda
