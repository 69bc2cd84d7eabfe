// cap * tanh(x / cap): Gemma 2 report (arXiv 2408.00118), section 2, "logit soft-capping".
#pragma once

#include "common/host_device.h"

namespace gemma2 {

// V is float or a vector of floats, `tanh` its hyperbolic tangent. static: every instruction set
// has its own.
template <typename V, typename Tanh>
GEMMA2_HOST_DEVICE static inline V capped(V x, float cap, const Tanh& tanh) {
  return cap * tanh(x / cap);
}

}  // namespace gemma2
