// Which columns of a call are written to a cache, and where: the same for cache_write and
// rope_cache.
#pragma once

#include "common/visibility.h"

namespace gemma2 {

struct ColumnRange {
  int64_t begin, end;  // columns [begin, end); begin == end: none
};

// Column s has position p = q_start + s. It is written iff max(0, k_base, kv_len - capacity) <= p <
// kv_len: no pads, nothing before the buffer, and only the last `capacity` positions, so that no
// two columns meet in a slot.
GEMMA2_HOST_DEVICE static inline ColumnRange written_columns(int64_t q_start, int64_t kv_len,
                                                             int64_t k_base, int64_t length,
                                                             int64_t capacity) {
  if (kv_len <= 0 || q_start >= kv_len || q_start <= -length) return {0, 0};
  int64_t first = kv_len - capacity;
  if (first < k_base) first = k_base;
  if (first < 0) first = 0;
  const int64_t end = kv_len - q_start < length ? kv_len - q_start : length;
  const int64_t begin = first > q_start ? first - q_start : 0;
  if (begin >= end) return {0, 0};
  return {begin, end};
}

GEMMA2_HOST_DEVICE static inline int64_t write_slot(int64_t p, int64_t k_base, int64_t capacity) {
  if (mutated(Mutation::ring_slot_shifted)) p += 1;
  return slot_of(p, k_base, capacity);
}

}  // namespace gemma2
