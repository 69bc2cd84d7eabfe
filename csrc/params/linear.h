#pragma once

#include "common/dtype.h"

namespace gemma2 {

// out[m, n] = sum_k x[m, k] weight[n, k], accumulated in float32, rounded once.
struct LinearParams {
  const void* x;       // [m, k], rows `x_stride` elements apart
  const void* weight;  // [n, k], rows `weight_stride` elements apart, as nn.Linear holds it
  void* out;           // [m, n], dense
  int64_t m, n, k, x_stride, weight_stride;
  DType dtype;
};

}  // namespace gemma2
