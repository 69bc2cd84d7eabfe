// Neighbouring elements of a tensor as they lie in memory, moved in one access: half the registers
// of floats for what is loaded long before it is used.
#pragma once

#include "cuda/ptx.h"

namespace gemma2::cuda {

// kCount elements of T: 16 bytes, or 8 in the narrower of two tensors that are walked together, or
// one element where alignment allows no more.
template <typename T, int kCount>
struct Pack {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes == 16 || kBytes == 8 || kCount == 1, "one access");
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  uint32_t words[kWords];
};

// As many elements as make 16 bytes of the widest of these types.
template <typename... T>
constexpr int pack_count() {
  int widest = 1;
  ((widest = static_cast<int>(sizeof(T)) > widest ? static_cast<int>(sizeof(T)) : widest), ...);
  return 16 / widest;
}

// p is aligned to the pack's bytes.
template <int kCount, typename T>
GEMMA2_DEVICE Pack<T, kCount> load_pack(const T* p) {
  if constexpr (Pack<T, kCount>::kBytes == 16) {
    const uint4 v = load(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (Pack<T, kCount>::kBytes == 8) {
    const uint2 v = load(reinterpret_cast<const uint2*>(p));
    return {{v.x, v.y}};
  } else if constexpr (sizeof(T) == 4) {
    return {{__float_as_uint(load(p))}};
  } else {
    return {{load(p).bits}};
  }
}
// Of memory that is read once in the kernel and not written by it.
template <int kCount, typename T>
GEMMA2_DEVICE Pack<T, kCount> load_pack_once(const T* p) {
  if constexpr (Pack<T, kCount>::kBytes == 16) {
    const uint4 v = load_once(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  } else {
    return load_pack<kCount>(p);
  }
}
template <int kCount, typename T>
GEMMA2_DEVICE void store_pack(T* p, const Pack<T, kCount>& v) {
  if constexpr (Pack<T, kCount>::kBytes == 16)
    store(reinterpret_cast<uint4*>(p), uint4{v.words[0], v.words[1], v.words[2], v.words[3]});
  else if constexpr (Pack<T, kCount>::kBytes == 8)
    store(reinterpret_cast<uint2*>(p), uint2{v.words[0], v.words[1]});
  else if constexpr (sizeof(T) == 4)
    store(p, __uint_as_float(v.words[0]));
  else
    store(p, T{static_cast<uint16_t>(v.words[0])});
}

template <typename T, int kCount>
GEMMA2_DEVICE float element(const Pack<T, kCount>& v, int i) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(v.words[i]);
  else
    return to_float(T{static_cast<uint16_t>(v.words[i / 2] >> (i % 2 * 16))});
}

// Each float rounded once.
template <typename T, int kCount>
GEMMA2_DEVICE Pack<T, kCount> pack_of(const float (&v)[kCount]) {
  Pack<T, kCount> p;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p.words[i] = __float_as_uint(v[i]);
  } else if constexpr (kCount == 1) {
    p.words[0] = from_float<T>(v[0]).bits;
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) p.words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
  }
  return p;
}

}  // namespace gemma2::cuda
