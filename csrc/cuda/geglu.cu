// geglu: out = gelu_tanh(gate) * up, in float32, rounded once.
#include "common/geglu.h"

#include "cuda/launch.h"
#include "cuda/pack.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 128;

#ifndef VARIANT
#define VARIANT 0
#endif
GEMMA2_DEVICE float gated(float gate, float up) {
#if VARIANT == 0
  return gelu_tanh(gate, [](float u) { return expf(u); }) * up;
#elif VARIANT == 1
  return __fdividef(gate, 1.0f + expf(kGeluMinusTwice * (gate + kGeluCubic * (gate * gate * gate)))) * up;
#else
  constexpr float k1 = kGeluMinusTwice * 1.44269504f, k3 = k1 * kGeluCubic;
  return __fdividef(gate, 1.0f + exp2_approx(gate * (k1 + k3 * (gate * gate)))) * up;
#endif
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) geglu_kernel(GegluParams p) {
  // Not one 64-bit index: a pointer of the block and an int of the thread keep 16 bytes one store.
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kCount);
  const int i = threadIdx.x * kCount;
  if (first + i >= p.width) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride + first;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride + first;
    T* out = static_cast<T*>(p.out) + row * p.width + first;
    const auto g = load_pack_once<kCount>(gate + i);
    const auto u = load_pack_once<kCount>(up + i);
    float v[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = gated(element(g, e), element(u, e));
    store_pack(out + i, pack_of<T>(v));
  }
}

template <typename T, int kCount>
void run(const GegluParams& p, CudaCall& call) {
  const int64_t blocks = ceil_div(p.width, kThreads * kCount);
  launch(call, "geglu", geglu_kernel<T, kCount>, dim3(blocks, p.rows < 65535 ? p.rows : 65535),
         kThreads, 0, p);
}

}  // namespace

void geglu(const GegluParams& given, CudaCall& call) {
  GegluParams p = given;
  if (p.rows <= 1 || (p.gate_stride == p.width && p.up_stride == p.width)) {
    // One long row: nothing is lost at the ends of short ones.
    p.width = p.gate_stride = p.up_stride = p.rows * p.width;
    p.rows = 1;
  }
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (rows_of_16_bytes<T>(p.gate, p.gate_stride) && rows_of_16_bytes<T>(p.up, p.up_stride) &&
        rows_of_16_bytes<T>(p.out, p.width))
      run<T, pack_count<T>()>(p, call);
    else
      run<T, 1>(p, call);
  });
}

}  // namespace gemma2::cuda
