// geglu: out = gelu_tanh(gate) * up, in float32, rounded once.
//
// One exponential and one division an element; reads two rows and writes one. Bound by arithmetic
// in decode (one row of 9216 lies in L1), by memory in prefill. Called by gemma2/ops/geglu.py;
// reference: gemma2/reference.py.

#include "common/geglu.h"

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should get at least

template <typename T>
void geglu_span(const T* gate, const T* up, T* out, int64_t n) {
  for_lanes(n, [&](int64_t i, int64_t lanes) {
    const vf32 g = gelu_tanh(load_upto(gate + i, lanes), [](vf32 u) { return exp(u); });
    store_upto(out + i, g * load_upto(up + i, lanes), lanes);
  });
}

}  // namespace

void geglu(const GegluParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    // Pieces of elements, not of rows, so that the one row of a decode step is shared out, too.
    parallel(p.rows * p.width, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / p.width, column = begin % p.width;
        const int64_t n = min64(end - begin, p.width - column);
        geglu_span(static_cast<const T*>(p.gate) + row * p.gate_stride + column,
                   static_cast<const T*>(p.up) + row * p.up_stride + column,
                   static_cast<T*>(p.out) + begin, n);
        begin += n;
      }
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
