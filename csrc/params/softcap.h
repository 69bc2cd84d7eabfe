#pragma once

#include "common/dtype.h"

namespace gemma2 {

// out = cap * tanh(x / cap), in float32, rounded once.
struct SoftcapParams {
  const void* x;  // [n], dense
  void* out;      // [n], dense
  int64_t n;
  float cap;
  DType dtype;
};

}  // namespace gemma2
