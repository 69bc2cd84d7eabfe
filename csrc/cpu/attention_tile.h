// What attention works on: blocks of query rows, tiles of 64 keys, and the packing of a tile's keys
// and values for the products of gemm.h.
#pragma once

#include "common/visibility.h"
#include "cpu/attention_softmax.h"
#include "cpu/gemm.h"
#include "params/attention.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kTile = 64;      // keys; tiles start at multiples of it of the position
constexpr int64_t kMaxRows = 192;  // rows of a block: strips of kTileRows without a rest
constexpr int64_t kMaxStrips = kMaxRows / kTileRows;
constexpr int64_t kMaxHeadDim = 256;

static_assert(kTile % kPanel == 0 && kMaxRows % kTileRows == 0,
              "panels fill tiles, strips fill blocks");

struct Problem {
  const AttentionParams& p;
  int64_t group, rows;  // query heads per kv head; rows = q_length * group
  SoftmaxScales scales;
};

// Rows [first, first + n) of one kv head (row = query column * group + head of the group), and the
// keys that each may see.
struct Block {
  int64_t b, h, first, n;
  int64_t lo[kMaxRows], hi[kMaxRows];
  int64_t lo_all, hi_all;  // their union; equal: nobody sees anything
};

inline void fill_block(const Problem& problem, int64_t b, int64_t h, int64_t first, int64_t n,
                       Block& block) {
  const AttentionParams& p = problem.p;
  block.b = b;
  block.h = h;
  block.first = first;
  block.n = n;
  block.lo_all = INT64_MAX;
  block.hi_all = INT64_MIN;
  const int64_t kv_len = p.kv_len[b], k_base = p.k_base ? p.k_base[b] : 0;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t column = (first + r) / problem.group;
    const int64_t kv_start = p.kv_start ? p.kv_start[b * p.q_length + column] : 0;
    KeyRange seen = visible_keys(p.q_start[b] + column, kv_len, kv_start, k_base, p.window);
    seen.lo = max64(seen.lo, kv_len - p.capacity);  // the buffer holds no others
    if (seen.lo >= seen.hi) seen = {0, 0};
    block.lo[r] = seen.lo;
    block.hi[r] = seen.hi;
    if (seen.lo < seen.hi) {
      block.lo_all = min64(block.lo_all, seen.lo);
      block.hi_all = max64(block.hi_all, seen.hi);
    }
  }
  if (block.lo_all > block.hi_all) block.lo_all = block.hi_all = 0;
}

// Where row r of a block lies in q, out and lse.
struct RowPlace {
  int64_t head, column;
};
inline RowPlace place_of(const Problem& problem, const Block& block, int64_t r) {
  const int64_t row = block.first + r;
  return {block.h * problem.group + row % problem.group, row / problem.group};
}

// Which keys of a tile each row sees, and where keys and values lie.
struct Tile {
  int begin[kMaxRows], end[kMaxRows];  // row r sees keys [begin, end) of the tile
  // The same for strips of kTileRows rows, as unions; begin >= end: skipped.
  int strip_begin[kMaxStrips], strip_end[kMaxStrips];
  uint64_t seen;         // bit j: some row sees key j
  const char* k[kTile];  // null unless seen
  const char* v[kTile];
};

template <typename T>
inline void fill_tile(const Problem& problem, const Block& block, int64_t start, Tile& tile) {
  const AttentionParams& p = problem.p;
  tile.seen = 0;
  for (int64_t strip = 0; strip * kTileRows < block.n; ++strip) {
    int first = kTile, last = 0;
    for (int64_t r = strip * kTileRows; r < min64(block.n, (strip + 1) * kTileRows); ++r) {
      const int begin = (int)min64(max64(block.lo[r] - start, 0), kTile);
      const int end = (int)min64(max64(block.hi[r] - start, 0), kTile);
      tile.begin[r] = begin;
      tile.end[r] = end;
      if (begin >= end) continue;
      first = begin < first ? begin : first;
      last = end > last ? end : last;
      const uint64_t below_end = end == kTile ? ~0ull : (1ull << end) - 1;
      tile.seen |= below_end & ~((1ull << begin) - 1);
    }
    tile.strip_begin[strip] = first;
    tile.strip_end[strip] = last;
  }
  if (tile.seen == 0) return;
  const int64_t base = p.k_base ? p.k_base[block.b] : 0;
  const T* k = static_cast<const T*>(p.k) + block.b * p.k_strides.b + block.h * p.k_strides.h;
  const T* v = static_cast<const T*>(p.v) + block.b * p.v_strides.b + block.h * p.v_strides.h;
  int64_t slot = -1;
  for (int64_t j = 0; j < kTile; ++j) {
    if ((tile.seen >> j & 1) == 0) {
      tile.k[j] = tile.v[j] = nullptr;
      slot = -1;
      continue;
    }
    slot = slot < 0 ? slot_of(start + j, base, p.capacity) : slot + 1;
    if (slot == p.capacity) slot = 0;
    tile.k[j] = reinterpret_cast<const char*>(k + slot * p.k_strides.s);
    tile.v[j] = reinterpret_cast<const char*>(v + slot * p.v_strides.s);
  }
}

// ---- Operands of the products: float32 words, or pairs of bfloat16 where the processor multiplies
// those ----

// Queries and probabilities are A: rows of words.
inline void widen_row(const float* from, float* to, int64_t n) {
  memcpy(to, from, n * sizeof(float));
}
template <typename T>
inline void widen_row(const T* from, float* to, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) store(to + d, load(from + d));
}

template <typename Word>
struct Operands;

template <>
struct Operands<Single> {
  using Probability = float;
  template <typename Q>
  static void pack_query(const Q* q, int64_t head_dim, float* to) {
    widen_row(q, to, head_dim);
  }
  // kLanes words of a key, from word w on.
  template <typename T>
  static vf32 key_words(const T* k, int64_t w) {
    return load(k + w);
  }
  // Row j of V as B: kLanes columns from d on.
  template <typename T>
  static vf32 value_words(const Tile& tile, int64_t j, int64_t d) {
    const T* v = reinterpret_cast<const T*>(tile.v[j]);
    return v == nullptr ? vf32{} : load(v + d);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Operands<Bf16Pair> {
  using Probability = bf16_t;
  static void pack_query(const bf16_t* q, int64_t head_dim, float* to) {
    memcpy(to, q, head_dim * sizeof(bf16_t));
  }
  static vf32 key_words(const bf16_t* k, int64_t w) {
    vf32 words;
    memcpy(&words, k + 2 * w, sizeof words);
    return words;
  }
  // Keys 2 j and 2 j + 1 share a word.
  template <typename T>
  static vf32 value_words(const Tile& tile, int64_t j, int64_t d) {
    return as_float(bits_of(tile.v[2 * j], d) | (bits_of(tile.v[2 * j + 1], d) << 16));
  }

 private:
  static vu32 bits_of(const char* v, int64_t d) {
    if (v == nullptr) return vu32{};
    vu16 half;
    memcpy(&half, reinterpret_cast<const bf16_t*>(v) + d, sizeof half);
    return __builtin_convertvector(half, vu32);
  }
};
#endif

// K as B of Q K: for each chunk of words, panels of keys, [words / chunk][64 /
// kPanel][chunk][kPanel].
template <typename T, typename Word>
__attribute__((noinline)) void pack_keys(const Tile& tile, int64_t words, float* out) {
  const int64_t chunk = min64(Word::kChain, words);
  for (int64_t key = 0; key < kTile; key += kLanes) {
    float* panel = out + (key / kPanel) * chunk * kPanel + key % kPanel;
    for (int64_t w = 0; w < words; w += kLanes) {
      vf32 row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* k = reinterpret_cast<const T*>(tile.k[key + i]);
        row[i] = k == nullptr ? vf32{} : Operands<Word>::key_words(k, w);
      }
      transpose(row);
      float* to = panel + w / chunk * chunk * kTile + w % chunk * kPanel;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + i * kPanel, row[i]);
    }
  }
}

// V as B of P V: [head_dim / kPanel][64 keys in words][kPanel].
template <typename T, typename Word>
__attribute__((noinline)) void pack_values(const Tile& tile, int64_t head_dim, float* out) {
  constexpr int64_t kWords = kTile / Word::kPerWord;
  for (int64_t j = 0; j < kWords; ++j)
    for (int64_t d = 0; d < head_dim; d += kPanel) {
      float* to = out + d * kWords + j * kPanel;
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i)
        store(to + i * kLanes, Operands<Word>::template value_words<T>(tile, j, d + i * kLanes));
    }
}

}  // namespace
}  // namespace gemma2::GEMMA2_ISA
