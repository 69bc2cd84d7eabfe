// softcap: out = cap * tanh(x / cap), in float32, rounded once.
//
// A thread takes 16 bytes. Bound by memory: 2 sizeof(T) bytes an element, each moved once. Called by
// csrc/bindings/softcap.cpp.

#include "common/mutate.h"
#include "common/softcap.h"
#include "cuda/launch.h"
#include "cuda/vec.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float cap_one(float x, float cap) {
  if (mutated(Mutation::logits_cap_dropped)) return x;
  return capped(x, cap, [](float u) { return tanhf(u); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) softcap_kernel(SoftcapParams p, bool aligned) {
  constexpr int kCount = Vec<T>::kCount;
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  if (aligned && first + kCount <= p.n) {
    Vec<T> v = load_vec_once(x + first);
#pragma unroll
    for (float& at : v.at) at = cap_one(at, p.cap);
    store_vec(out + first, v);
    return;
  }
  for (int64_t i = first; i < first + kCount && i < p.n; ++i)
    store(out + i, from_float<T>(cap_one(to_float(load(x + i)), p.cap)));
}

}  // namespace

void softcap(const SoftcapParams& p, CudaCall& call) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool aligned = rows_of_16_bytes<T>(p.x, 0) && rows_of_16_bytes<T>(p.out, 0);
    launch(call, "softcap", softcap_kernel<T>, ceil_div(p.n, kThreads * Vec<T>::kCount), kThreads, 0,
           p, aligned);
  });
}

}  // namespace gemma2::cuda
