#pragma once

#include "common/dtype.h"
#include "params/strided.h"

namespace gemma2 {

// The attention contract: docs/attention.md. Who sees whom: common/visibility.h.
struct AttentionParams {
  const void* q;  // [B, Hq, Sq, D]
  const void*
      k;  // [B, Hkv, C, D], a ring (k_base null) or a linear buffer whose slot 0 holds k_base[b]
  const void* v;
  void* out;                // [B, Hq, Sq, D], q's dtype
  float* lse;               // [B, Hq, Sq], dense
  const int64_t* q_start;   // [B]
  const int64_t* kv_len;    // [B]
  const int64_t* kv_start;  // [B, Sq] dense, or null
  const int64_t* k_base;    // [B] or null
  int64_t batch, q_heads, kv_heads, q_length, capacity, head_dim;
  Strides3 q_strides, k_strides, v_strides, out_strides;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: unbounded
  bool deterministic;
  DType q_dtype, kv_dtype;
};

}  // namespace gemma2
