// softcap: out = cap * tanh(x / cap), in float32, rounded once.
//
// One exponential and two divisions an element. Bound by arithmetic where x lies in a cache (the
// logits of one row, 512 KB in bfloat16), by memory beyond. Called by gemma2/ops/softcap.py;
// reference: gemma2/reference.py.

#include "common/softcap.h"

#include "common/mutate.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should get at least

}  // namespace

void softcap(const SoftcapParams& p) {
  const bool dropped = mutated(Mutation::logits_cap_dropped);
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(p.n, kGrain, [&](int64_t begin, int64_t end) {
      const T* x = static_cast<const T*>(p.x) + begin;
      T* out = static_cast<T*>(p.out) + begin;
      for_lanes(end - begin, [&](int64_t i, int64_t lanes) {
        const vf32 v = load_upto(x + i, lanes);
        const vf32 y = capped(v, p.cap, [](vf32 u) { return tanh(u); });
        store_upto(out + i, dropped ? v : y, lanes);
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
