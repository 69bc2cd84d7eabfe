// Who sees whom: the one place where causality, length, window, documents and the ring's base meet.
//
// A position counts a row's real tokens. The query at position p sees the keys [lo, hi):
//   hi = min(p + 1, kv_len)                                 causal, and no key that does not exist
//   lo = max(0, kv_start, k_base, p - window + 1)           document, buffer, window (which counts
//   p itself)
// Both bounds grow with p as long as kv_start does, so a block of queries sees the union
// [lo(first), hi(last)), and key blocks outside it are never touched.
#pragma once

#include <stdint.h>

#include "common/host_device.h"
#include "common/mutate.h"

namespace gemma2 {

struct KeyRange {
  int64_t lo, hi;  // visible iff lo <= j < hi; empty when lo >= hi
};

// window 0 is unbounded. kv_start 0 where there are no documents.
GEMMA2_HOST_DEVICE static inline KeyRange visible_keys(int64_t p, int64_t kv_len, int64_t kv_start,
                                                       int64_t k_base, int64_t window) {
  int64_t hi = p + 1;
  if (mutated(Mutation::future_visible)) hi += 1;
  if (hi > kv_len) hi = kv_len;
  if (mutated(Mutation::documents_ignored)) kv_start = 0;
  int64_t lo = kv_start > k_base ? kv_start : k_base;
  if (lo < 0) lo = 0;
  if (window > 0) {
    int64_t first = p - window + 1;
    if (mutated(Mutation::window_off_by_one)) first -= 1;
    if (first > lo) lo = first;
  }
  return {lo, hi};
}

// Slot of position p >= k_base in a buffer of `capacity` slots whose slot 0 holds k_base (0 for a
// ring). The difference fits in 64 bits without a sign, whatever the two are.
GEMMA2_HOST_DEVICE static inline int64_t slot_of(int64_t p, int64_t k_base, int64_t capacity) {
  const uint64_t ahead = static_cast<uint64_t>(p) - static_cast<uint64_t>(k_base);
  return static_cast<int64_t>(ahead % static_cast<uint64_t>(capacity));
}
// The same for a kernel that reads.
GEMMA2_HOST_DEVICE static inline int64_t read_slot(int64_t p, int64_t k_base, int64_t capacity) {
  if (mutated(Mutation::ring_slot_misread)) p += 1;
  return slot_of(p, k_base, capacity);
}

// Query head `member` of the `group` that share key/value head `kv_head`.
GEMMA2_HOST_DEVICE static inline int64_t query_head(int64_t kv_head, int64_t member, int64_t group,
                                                    int64_t kv_heads) {
  if (mutated(Mutation::groups_interleaved)) return member * kv_heads + kv_head;
  return kv_head * group + member;
}

}  // namespace gemma2
