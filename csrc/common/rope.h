// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the layout of Gemma's
// checkpoints: element i of a head's first half is paired with element i of its second half.
#pragma once

#include "common/host_device.h"

namespace gemma2 {

// V is float or a vector of floats. static: every instruction set has its own.
template <typename V>
GEMMA2_HOST_DEVICE static inline void rotate_pair(V x1, V x2, V cos, V sin, V& y1, V& y2) {
  y1 = x1 * cos - x2 * sin;
  y2 = x2 * cos + x1 * sin;
}

}  // namespace gemma2
