// Which columns of a chunk go to which slots of a cache: shared by cache_write and rope_cache.
#pragma once

#include "common/mutate.h"
#include "common/visibility.h"
#include "cpu/simd.h"
#include "params/cache_write.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// The columns [begin, end) of row b that are written; the first goes to position `first`.
struct CacheRow {
  int64_t begin, end, first, k_base;
  int64_t capacity;
  int64_t slot(int64_t column) const {
    const int64_t shift = mutated(Mutation::ring_slot_shifted) ? 1 : 0;
    return slot_of(first + (column - begin) + shift, k_base, capacity);
  }
};

inline CacheRow cache_row(const CacheWriteParams& p, int64_t b) {
  const int64_t base = p.k_base == nullptr ? 0 : p.k_base[b];
  const int64_t start = p.q_start[b], length = p.kv_len[b];
  const int64_t lowest = max64(max64(0, base), length - p.capacity);
  const int64_t begin = min64(max64(lowest - start, 0), p.length);
  const int64_t end = max64(min64(length - start, p.length), begin);
  return {begin, end, start + begin, base, p.capacity};
}

template <typename From, typename To>
inline void copy_row(const From* from, To* to, int64_t n) {
  for_lanes(n, [&](int64_t i, int64_t lanes) {
    store_upto(to + i, load_upto(from + i, lanes), lanes);
  });
}

}  // namespace
}  // namespace gemma2::GEMMA2_ISA
