// Sixteen bytes of a tensor as floats: the unit in which the memory-bound kernels move data.
#pragma once

#include "cuda/ptx.h"

namespace gemma2::cuda {

// kCount elements of T in 16 bytes: 4 of float32, 8 of the 16-bit types.
template <typename T>
struct Vec {
  static constexpr int kCount = 16 / sizeof(T);
  float at[kCount];
};

template <typename T>
GEMMA2_DEVICE Vec<T> unpack(uint4 bytes) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  Vec<T> v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v.at[i] = __uint_as_float(words[i]);
    } else {
      v.at[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
      v.at[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
  return v;
}

template <typename T>
GEMMA2_DEVICE uint4 pack(const Vec<T>& v) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(v.at[i]);
    else
      words[i] = pack2<T>(v.at[2 * i], v.at[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// p is aligned to 16 bytes.
template <typename T>
GEMMA2_DEVICE Vec<T> load_vec(const T* p) {
  return unpack<T>(load(reinterpret_cast<const uint4*>(p)));
}
// Of memory that is read once in the kernel and not written by it.
template <typename T>
GEMMA2_DEVICE Vec<T> load_vec_once(const T* p) {
  return unpack<T>(load_once(reinterpret_cast<const uint4*>(p)));
}
template <typename T>
GEMMA2_DEVICE void store_vec(T* p, const Vec<T>& v) {
  store(reinterpret_cast<uint4*>(p), pack<T>(v));
}

}  // namespace gemma2::cuda
