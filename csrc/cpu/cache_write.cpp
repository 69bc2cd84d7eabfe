// cache_write: k and v of a call into their slots (p - k_base) mod C; pads and what the ring has
// already lost are left out (common/cache_slots.h).
//
// Bound by memory: one copy, widened or rounded where the cache has another dtype. Called by
// gemma2/ops/cache_write.py; reference: gemma2/reference.py.

#include "common/cache_slots.h"
#include "cpu/cache_rows.h"
#include "cpu/kernels.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread should get at least

template <typename In, typename Out>
void write_head(const CacheWriteParams& p, int64_t b, int64_t h) {
  const int64_t base = p.k_base == nullptr ? 0 : p.k_base[b];
  const ColumnRange columns =
      written_columns(p.q_start[b], p.kv_len[b], base, p.length, p.capacity);
  const In* k = static_cast<const In*>(p.k) + b * p.k_strides.b + h * p.k_strides.h;
  const In* v = static_cast<const In*>(p.v) + b * p.v_strides.b + h * p.v_strides.h;
  Out* k_cache = static_cast<Out*>(p.k_cache) + b * p.k_cache_strides.b + h * p.k_cache_strides.h;
  Out* v_cache = static_cast<Out*>(p.v_cache) + b * p.v_cache_strides.b + h * p.v_cache_strides.h;
  for (int64_t s = columns.begin; s < columns.end; ++s) {
    const int64_t slot = write_slot(p.q_start[b] + s, base, p.capacity);
    copy_row(k + s * p.k_strides.s, k_cache + slot * p.k_cache_strides.s, p.head_dim);
    copy_row(v + s * p.v_strides.s, v_cache + slot * p.v_cache_strides.s, p.head_dim);
  }
}

}  // namespace

void cache_write(const CacheWriteParams& p) {
  dispatch(p.dtype, [&](auto in) {
    dispatch(p.cache_dtype, [&](auto out) {
      parallel(p.batch * p.kv_heads, kGrain / (p.length * p.head_dim + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   write_head<typename decltype(in)::type, typename decltype(out)::type>(
                       p, i / p.kv_heads, i % p.kv_heads);
               });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
