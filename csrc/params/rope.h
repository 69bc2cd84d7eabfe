#pragma once

#include "common/dtype.h"
#include "params/strided.h"

namespace gemma2 {

// Rotates halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 = x[..., :D/2], x2 = x[...,
// D/2:].
struct RopeParams {
  const void* q;     // [B, Hq, S, D]
  const void* k;     // [B, Hkv, S, D]
  const float* cos;  // [B or 1, S, D/2], rows of a batch dense
  const float* sin;
  void* q_out;  // [B, Hq, S, D], strides of their own
  void* k_out;  // [B, Hkv, S, D]
  int64_t batch, q_heads, kv_heads, length, head_dim;
  Strides3 q_strides, k_strides, q_out_strides, k_out_strides;
  int64_t table_batch_stride;  // 0 when one table serves the batch
  DType dtype;
};

}  // namespace gemma2
