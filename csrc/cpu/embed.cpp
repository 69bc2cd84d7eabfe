// embed: out = weight[ids] * scale, the start of the residual stream. A copy of rows: bound by memory.
// Called by gemma2/ops/embed.py; reference: gemma2/reference.py.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {

void embed(const EmbedParams& p) {
  dispatch(p.weight_dtype, [&](auto w) {
    dispatch(p.out_dtype, [&](auto o) {
      using W = typename decltype(w)::type;
      using O = typename decltype(o)::type;
      parallel(p.tokens, 16384 / (p.hidden + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const W* row = static_cast<const W*>(p.weight) + p.ids[t] * p.weight_stride;
          O* out = static_cast<O*>(p.out) + t * p.hidden;
          for_lanes(p.hidden, [&](int64_t i, int64_t lanes) {
            store_upto(out + i, load_upto(row + i, lanes) * p.scale, lanes);
          });
        }
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
