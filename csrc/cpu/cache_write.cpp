// cache_write: column s of row b, at position p = q_start[b] + s, goes to slot (p - k_base[b]) mod C, if it is
// a real token and among the last C. A copy: bound by memory.
// Called by gemma2/ops/cache_write.py; reference: gemma2/reference.py.

#include "cpu/cache_rows.h"
#include "cpu/kernels.h"

namespace gemma2::GEMMA2_ISA {

void cache_write(const CacheWriteParams& p) {
  dispatch(p.dtype, [&](auto from) {
    dispatch(p.cache_dtype, [&](auto to) {
      using From = typename decltype(from)::type;
      using To = typename decltype(to)::type;
      const int64_t row_work = p.length * p.head_dim + 1;
      parallel(p.batch * p.kv_heads, 16384 / row_work + 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t b = item / p.kv_heads, h = item % p.kv_heads;
          const CacheRow row = cache_row(p, b);
          for (int64_t s = row.begin; s < row.end; ++s) {
            const int64_t slot = row.slot(s);
            const Strides3 &ks = p.k_strides, &vs = p.v_strides;
            const Strides3 &kc = p.k_cache_strides, &vc = p.v_cache_strides;
            copy_row(static_cast<const From*>(p.k) + b * ks.b + h * ks.h + s * ks.s,
                     static_cast<To*>(p.k_cache) + b * kc.b + h * kc.h + slot * kc.s, p.head_dim);
            copy_row(static_cast<const From*>(p.v) + b * vs.b + h * vs.h + s * vs.s,
                     static_cast<To*>(p.v_cache) + b * vc.b + h * vc.h + slot * vc.s, p.head_dim);
          }
        }
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
