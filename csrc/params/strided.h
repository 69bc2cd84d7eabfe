#pragma once

#include <stdint.h>

namespace gemma2 {

// A tensor [B, H, S, D] with a dense last dimension: element strides of the other three.
struct Strides3 {
  int64_t b, h, s;
};

}  // namespace gemma2
