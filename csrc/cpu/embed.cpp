// embed: out[t, :] = weight[ids[t], :] * scale, in float32, rounded once (not at all where out is
// float32).
//
// Bound by memory: one row read and one written a token. The binding has checked the ids and
// rounded the scale. Called by gemma2/ops/embed.py; reference: gemma2/reference.py.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread should get at least

template <typename W, typename Out>
void embed_rows(const EmbedParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const W* row = static_cast<const W*>(p.weight) + p.ids[t] * p.weight_stride;
    Out* out = static_cast<Out*>(p.out) + t * p.hidden;
    for_lanes(p.hidden, [&](int64_t i, int64_t lanes) {
      store_upto(out + i, load_upto(row + i, lanes) * p.scale, lanes);
    });
  }
}

}  // namespace

void embed(const EmbedParams& p) {
  dispatch(p.weight_dtype, [&](auto w) {
    dispatch(p.out_dtype, [&](auto o) {
      parallel(p.tokens, kGrain / (p.hidden + 1) + 1, [&](int64_t begin, int64_t end) {
        embed_rows<typename decltype(w)::type, typename decltype(o)::type>(p, begin, end);
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
