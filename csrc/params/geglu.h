#pragma once

#include "common/dtype.h"

namespace gemma2 {

// out = gelu_tanh(gate) * up, in float32, rounded once.
struct GegluParams {
  const void* gate;  // [rows, width], rows `gate_stride` elements apart
  const void* up;
  void* out;  // [rows, width], dense
  int64_t rows, width, gate_stride, up_stride;
  DType dtype;
};

}  // namespace gemma2
