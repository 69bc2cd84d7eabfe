// The gate of Gemma's MLP: gelu in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415),
//   gelu_tanh(x) = x / 2 (1 + tanh(u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//                = x / (1 + exp(-2 u)).
// The second form needs one exponential and no tanh, and loses nothing by cancellation where
// tanh(u) nears -1.
#pragma once

#include "common/host_device.h"

namespace gemma2 {

constexpr float kGeluCubic = 0.044715f;
constexpr float kGeluMinusTwice = -1.59576912160573f;  // -2 sqrt(2 / pi)

// V is float or a vector of floats, `exp` its exponential. static: every instruction set has its
// own.
template <typename V, typename Exp>
GEMMA2_HOST_DEVICE static inline V gelu_tanh(V x, const Exp& exp) {
  return x / (1.0f + exp(kGeluMinusTwice * (x + kGeluCubic * (x * x * x))));
}

}  // namespace gemma2
