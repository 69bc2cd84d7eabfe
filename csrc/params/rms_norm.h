#pragma once

#include "common/dtype.h"

namespace gemma2 {

// out[r, :] = x[r, :] * rsqrt(mean(x[r, :]^2) + eps) * (1 + weight), in float32, rounded once.
struct RmsNormParams {
  const void* x;       // [rows, hidden], rows `x_stride` elements apart
  const void* weight;  // [hidden]
  void* out;           // [rows, hidden], dense, of the weight's dtype
  int64_t rows, hidden, x_stride;
  float eps;
  DType x_dtype, weight_dtype;
};

// residual_out = residual + rms(x; post), rounded to the residual's dtype; y = rms(residual_out;
// pre).
struct AddRmsNormParams {
  const void* residual;     // [rows, hidden], dense
  const void* x;            // [rows, hidden], rows `x_stride` elements apart
  const void* post_weight;  // [hidden]
  const void* pre_weight;   // [hidden]
  void* residual_out;       // [rows, hidden], dense; may be `residual` itself
  void* y;                  // [rows, hidden], dense, of the weights' dtype
  int64_t rows, hidden, x_stride;
  float eps;
  DType residual_dtype, x_dtype, weight_dtype;
};

}  // namespace gemma2
