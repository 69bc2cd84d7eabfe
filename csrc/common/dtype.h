// The element types of tensors, without torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace gemma2 {

enum class DType : int8_t { f32, bf16, f16 };

// Storage types: the arithmetic happens in float, after load() of csrc/cpu/simd.h.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};
static_assert(sizeof(bf16_t) == 2 && sizeof(f16_t) == 2, "two bytes as they lie in a tensor");

static inline size_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace gemma2
