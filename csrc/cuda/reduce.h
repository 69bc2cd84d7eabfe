// Sums and maxima over a warp or a block, in an order that depends on nothing but the block's size:
// the same bits in every run and in every thread.
#pragma once

#include <math.h>

#include "cuda/ptx.h"

namespace gemma2::cuda {

struct Sum {
  static constexpr float kIdentity = 0.0f;
  GEMMA2_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float kIdentity = -INFINITY;
  GEMMA2_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over `kWidth` neighbouring lanes, a power of two, which all get the result: at each step the two
// lanes of a pair compute the same number, as Op is commutative. All 32 lanes take part.
template <typename Op, int kWidth = kWarp>
GEMMA2_DEVICE float reduce_warp(float v) {
#pragma unroll
  for (int bits = kWidth / 2; bits > 0; bits /= 2) v = Op()(v, shuffle_xor(v, bits));
  return v;
}

// What each warp has got, before the block adds up: a slot of its own, so two reductions in a row
// take two of them instead of a second barrier.
struct BlockPartials {
  float of_warp[kWarp];
};

// Over a one-dimensional block of full warps, at most kMaxWarps (a power of two); every thread gets
// the result. One barrier, none where the block is one warp. `partials` is shared memory that is
// used for nothing else meanwhile.
template <typename Op, int kMaxWarps = kWarp>
GEMMA2_DEVICE float reduce_block(float v, BlockPartials& partials) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  v = reduce_warp<Op>(v);
  if (warps == 1) return v;
  if (lane == 0) store(&partials.of_warp[threadIdx.x / kWarp], v);
  sync_block();
  const int warp = lane % kMaxWarps;
  return reduce_warp<Op, kMaxWarps>(warp < warps ? load(&partials.of_warp[warp]) : Op::kIdentity);
}

template <int kWidth = kWarp>
GEMMA2_DEVICE float sum_warp(float v) {
  return reduce_warp<Sum, kWidth>(v);
}
template <int kWidth = kWarp>
GEMMA2_DEVICE float max_warp(float v) {
  return reduce_warp<Max, kWidth>(v);
}
template <int kMaxWarps = kWarp>
GEMMA2_DEVICE float sum_block(float v, BlockPartials& partials) {
  return reduce_block<Sum, kMaxWarps>(v, partials);
}
template <int kMaxWarps = kWarp>
GEMMA2_DEVICE float max_block(float v, BlockPartials& partials) {
  return reduce_block<Max, kMaxWarps>(v, partials);
}

}  // namespace gemma2::cuda
