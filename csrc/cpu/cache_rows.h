// What cache_write and rope_cache share: a row of D elements into a cache of perhaps another dtype.
#pragma once

#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

template <typename In, typename Out>
inline void copy_row(const In* in, Out* out, int64_t n) {
  for_lanes(
      n, [&](int64_t i, int64_t lanes) { store_upto(out + i, load_upto(in + i, lanes), lanes); });
}
template <typename T>
inline void copy_row(const T* in, T* out, int64_t n) {
  memcpy(out, in, n * sizeof(T));
}

}  // namespace
}  // namespace gemma2::GEMMA2_ISA
