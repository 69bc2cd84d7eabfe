// softcap: out = cap * tanh(x / cap), in float32, rounded once.
//
// A thread takes 16 bytes, or one element where a tensor is not aligned. Planned: 40 registers, 64
// warps on sm_80 and sm_90, 32 KB in flight. Bound by memory: 2 sizeof(T) bytes an element, each
// moved once; about 18 instructions an element must hide behind them. An exact division by the cap
// would make them 33, with a branch each that keeps elements from overlapping: the product with 1 /
// cap is one rounding further from x / cap, and tanh makes no relative error larger. Called by
// csrc/bindings/softcap.cpp.

#include "common/mutate.h"
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 256;

// capped() of common/softcap.h.
GEMMA2_DEVICE float cap_one(float x, float cap, float inverse_cap) {
  if (mutated(Mutation::logits_cap_dropped)) return x;
  return cap * tanhf(x * inverse_cap);
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) softcap_kernel(SoftcapParams p, float inverse_cap) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  if (first + kCount <= p.n) {
    const auto v = load_pack_once<kCount>(x + first);
    float y[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) y[e] = cap_one(element(v, e), p.cap, inverse_cap);
    store_pack(out + first, pack_of<T>(y));
    return;
  }
  for (int64_t i = first; i < p.n; ++i)  // the last thread's
    store(out + i, from_float<T>(cap_one(to_float(load(x + i)), p.cap, inverse_cap)));
}

template <typename T, int kCount>
void run(const SoftcapParams& p, CudaCall& call) {
  launch(call, "softcap", softcap_kernel<T, kCount>, ceil_div(p.n, kThreads * kCount), kThreads, 0,
         p, 1.0f / p.cap);
}

}  // namespace

void softcap(const SoftcapParams& p, CudaCall& call) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (rows_of_16_bytes<T>(p.x, 0) && rows_of_16_bytes<T>(p.out, 0))
      run<T, pack_count<T>()>(p, call);
    else
      run<T, 1>(p, call);
  });
}

}  // namespace gemma2::cuda
