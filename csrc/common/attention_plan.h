// How attention is cut: decode in how many splits of keys, and where each begins; deterministic
// attention at fixed positions. Pure functions: numbers come from what the host knows before a
// launch, ranges from what the device knows.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace gemma2 {

constexpr int kMaxSplits = 128;
// Splits begin at multiples of it of the first visible key, so they differ by at most so many keys.
constexpr int kSplitKeys = 8;

// The most keys that the queries of a row can see together.
constexpr int64_t most_visible_keys(int64_t capacity, int64_t window, int64_t q_length) {
  const int64_t seen = window + q_length - 1;
  return window > 0 && seen < capacity ? seen : capacity;
}

// For `sequences` (rows of the batch x key/value heads) of at most `keys` keys, which a block reads
// in tiles of `tile`; the device runs `resident` blocks at a time. Chosen is the least of
//   waves of blocks * (a block's tiles + 2, its start and end) + 2, the second launch, if it is cut
// among the numbers that fill 1 to 4 waves, in units of a tile's time; of equals, the smallest.
constexpr int64_t decode_splits(int64_t sequences, int64_t keys, int64_t tile, int64_t resident) {
  constexpr int64_t kBlock = 2, kCombine = 2, kWaves = 4;
  if (sequences <= 0) return 1;
  const int64_t tiles = keys > tile ? (keys + tile - 1) / tile : 1;
  const int64_t most = tiles < kMaxSplits ? tiles : kMaxSplits;
  int64_t best = 1;
  int64_t best_cost = (sequences + resident - 1) / resident * (tiles + kBlock);
  for (int64_t fill = 1; fill <= kWaves; ++fill) {
    int64_t splits = fill * resident / sequences;
    if (splits > most) splits = most;
    if (splits <= 1) continue;
    const int64_t tiles_each = (tiles + splits - 1) / splits;
    splits = (tiles + tiles_each - 1) / tiles_each;  // as many as these are needed for all tiles
    const int64_t waves = (sequences * splits + resident - 1) / resident;
    const int64_t cost = waves * (tiles_each + kBlock) + kCombine;
    if (cost < best_cost || (cost == best_cost && splits < best)) {
      best = splits;
      best_cost = cost;
    }
  }
  return best;
}

// Where split `split` of `keys` keys begins; it ends where the next one begins.
GEMMA2_HOST_DEVICE static inline int split_begin(int keys, int splits, int split) {
  const int pieces = keys / kSplitKeys + (keys % kSplitKeys != 0), rest = pieces % splits;
  const int begin = pieces / splits * split + (split < rest ? split : rest);
  return begin == pieces ? keys : begin * kSplitKeys;
}

// ---- Deterministic attention (csrc/cuda/attention_prefill.cu) ----

// Sums over keys are closed where the position is a multiple of it: each is made alone.
constexpr int kSumKeys = 512;

// The most such sums that `keys` neighbouring keys take part in.
constexpr int64_t most_sums(int64_t keys) {
  return keys > 1 ? (keys + kSumKeys - 2) / kSumKeys + 1 : 1;
}

// Blocks that share the keys of a block of `rows` rows: as many as there are sums, which a second
// launch merges, or 1, which makes them in turn. Chosen is what takes less time, in units of a tile
// of 64 keys: a block's start and end count as 2, a block's sums, written and read, as 1 for each
// 16 rows, the second launch as 2.
constexpr int64_t sums_side_by_side(int64_t blocks, int64_t rows, int64_t keys, int64_t resident) {
  constexpr int64_t kTile = 64, kBlock = 2, kMerge = 2, kRows = 16;
  const int64_t sums = most_sums(keys);
  const int64_t in_turn =
      (blocks + resident - 1) / resident * ((keys + kTile - 1) / kTile + kBlock);
  const int64_t apart =
      (blocks * sums + resident - 1) / resident * (kSumKeys / kTile + kBlock + rows / kRows) +
      kMerge;
  return sums > 1 && apart < in_turn ? sums : 1;
}

}  // namespace gemma2
