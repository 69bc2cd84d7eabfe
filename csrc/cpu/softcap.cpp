// softcap: out = cap * tanh(x / cap), in float32, rounded once. Bound by memory in bfloat16, by tanh (one
// exp and one division) in float32. Called by gemma2/ops/softcap.py; reference: gemma2/reference.py.

#include "common/mutate.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {

void softcap(const SoftcapParams& p) {
  const bool dropped = mutated(Mutation::logits_cap_dropped);
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    parallel(p.n, 8192, [&](int64_t begin, int64_t end) {
      for_lanes(end - begin, [&](int64_t i, int64_t lanes) {
        const vf32 v = load_upto(x + begin + i, lanes);
        store_upto(out + begin + i, dropped ? v : p.cap * tanh(v / p.cap), lanes);
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
