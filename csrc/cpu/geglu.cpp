// geglu: out = gelu_tanh(gate) * up, in float32, rounded once.
// Bound by memory in bfloat16 on two threads, close to the cost of one exp and one division per element.
// Called by gemma2/ops/geglu.py; reference: gemma2/reference.py.

#include "common/geglu.h"

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {

void geglu(const GegluParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(p.rows, 8192 / (p.width + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* gate = static_cast<const T*>(p.gate) + r * p.gate_stride;
        const T* up = static_cast<const T*>(p.up) + r * p.up_stride;
        T* out = static_cast<T*>(p.out) + r * p.width;
        for_lanes(p.width, [&](int64_t i, int64_t lanes) {
          const vf32 g = load_upto(gate + i, lanes);
          const vf32 inner = kGeluScale * (g + kGeluCubic * g * g * g);
          const vf32 gelu = 0.5f * g * (1.0f + tanh(inner));
          store_upto(out + i, gelu * load_upto(up + i, lanes), lanes);
        });
      }
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
