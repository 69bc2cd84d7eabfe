#pragma once

#include "common/dtype.h"
#include "params/strided.h"

namespace gemma2 {

// Column s of row b has position p = q_start[b] + s and goes to slot (p - k_base[b]) mod capacity,
// iff max(0, k_base[b], kv_len[b] - capacity) <= p < kv_len[b]: pads are never written.
struct CacheWriteParams {
  const void* k;  // [B, Hkv, S, D]
  const void* v;
  void* k_cache;  // [B, Hkv, C, D]
  void* v_cache;
  const int64_t* q_start;  // [B]
  const int64_t* kv_len;   // [B]
  const int64_t* k_base;   // [B] or null: 0
  int64_t batch, kv_heads, length, head_dim, capacity;
  Strides3 k_strides, v_strides, k_cache_strides, v_cache_strides;
  DType dtype, cache_dtype;
};

}  // namespace gemma2
