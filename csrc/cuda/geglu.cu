// geglu: out = gelu_tanh(gate) * up, in float32, rounded once.
//
// A thread takes 16 bytes of gate and of up, both loaded before the first is used, or one element
// where rows are not aligned. The grid is blocks of a row x rows, so the one row of a decode step
// is spread out, too: 9 blocks at width 9216 in bfloat16. Planned: 40 registers, 48 warps on sm_80
// and sm_90, 48 KB in flight. Bound by memory, 3 sizeof(T) bytes an element, each moved once, while
// the arithmetic hides behind it: for 16-bit types two special functions and about 12 other
// instructions an element (with the exponential and the division of float32, about 35). Called by
// csrc/bindings/geglu.cpp.

#include "common/geglu.h"

#include "cuda/launch.h"
#include "cuda/pack.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kGridRows = 65535;  // the most of a grid's y

// gelu_tanh(gate) of common/geglu.h. For 16-bit types with log2 e folded into its constants and the
// quick power and division: with u = -2 sqrt(2 / pi) (x + 0.044715 x^3) the relative error is about
// |u| 2^-23, below 2^-16 for every u that leaves a result, and such a type rounds at 2^-9 or 2^-12.
template <typename T>
GEMMA2_DEVICE float gelu(float gate) {
  if constexpr (sizeof(T) == 4) {
    return gelu_tanh(gate, [](float u) { return expf(u); });
  } else {
    constexpr float kLog2E = 1.4426950408889634f;
    constexpr float kLinear = kGeluMinusTwice * kLog2E, kCubic = kLinear * kGeluCubic;
    return __fdividef(gate, 1.0f + exp2_approx(gate * (kLinear + kCubic * (gate * gate))));
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) geglu_kernel(GegluParams p) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  if (i >= p.width) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const auto gate =
        load_pack_once<kCount>(static_cast<const T*>(p.gate) + row * p.gate_stride + i);
    const auto up = load_pack_once<kCount>(static_cast<const T*>(p.up) + row * p.up_stride + i);
    float out[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = gelu<T>(element(gate, e)) * element(up, e);
    store_pack(static_cast<T*>(p.out) + row * p.width + i, pack_of<T>(out));
  }
}

template <typename T, int kCount>
void run(const GegluParams& p, CudaCall& call) {
  const int64_t blocks = ceil_div(p.width, kThreads * kCount);
  launch(call, "geglu", geglu_kernel<T, kCount>,
         dim3(blocks, p.rows < kGridRows ? p.rows : kGridRows), kThreads, 0, p);
}

}  // namespace

void geglu(const GegluParams& p, CudaCall& call) {
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
