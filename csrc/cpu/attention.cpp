// attention: out = softmax(mask(cap tanh(scale q k / cap))) v, and the
// log-sum-exp of the capped scores.
//
// Prefill. A work item is a block of rows (row = query x head of one group, so
// that the group shares its keys) against tiles of 64 keys that start at
// multiples of 64 of the position. Per tile: K is widened to float32 and
// transposed into panels, S = Q K, p = exp(cap tanh(.)) in place, V is widened
// into panels, O += P V; both products are gemm.h's. Blocks of 6 rows that see
// nothing of a tile are skipped, tiles that nobody sees are never read. Decode
// (at most 8 rows). The bytes of K and V are the limit: dot products along
// head_dim straight from the cache, 4 keys at a time, each key read once for
// the whole group.
//
// For 0 < softcap <= 64 there is no running maximum: exp of a capped score is
// an ordinary float32 number, so p = exp(s), l = sum p, o = sum p v, out = o /
// l. Otherwise the usual online form.
//
// Sums are made in splits of 512 keys aligned to the position, each alone, then
// added in order. Hence long contexts are split over threads without changing a
// bit, and with `deterministic`, which sends decode through prefill's products,
// a row's bits depend on nothing but its own query and keys.
//
// Called by gemma2/ops/attention.py; reference: gemma2/reference.py.

#include "common/mutate.h"
#include "common/visibility.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kTile = 64;      // keys
constexpr int64_t kSplit = 512;    // keys, summed alone
constexpr int64_t kMaxRows = 128;  // rows of a work item
constexpr int64_t kDirectRows = 8; // at most: decode's path
constexpr int64_t kMaxHeadDim = 256;
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kInfinity = __builtin_inff();

static_assert(kTile % kPanel == 0 && kSplit % kTile == 0,
              "panels fill tiles, tiles fill splits");

struct Problem {
  const AttentionParams &p;
  int64_t group, rows; // query heads per kv head; rows = q_length * group
  float tanh_scale,
      exp2_scale; // without a maximum: p = 2^(exp2_scale tanh(tanh_scale s))
  float softcap;  // 0: none
};

// Sums over some keys: o[rows, D] = sum p v, l[rows] = sum p, and with a
// maximum m[rows] (base 2).
struct Sums {
  float *o, *l, *m;
  void clear(int64_t rows, int64_t head_dim) const {
    memset(o, 0, rows * head_dim * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      l[r] = 0;
      m[r] = -kInfinity;
    }
  }
};
constexpr int64_t sums_floats(int64_t rows, int64_t head_dim) {
  return rows * (head_dim + 2);
}
inline Sums sums_at(float *at, int64_t rows, int64_t head_dim) {
  return {at, at + rows * head_dim, at + rows * (head_dim + 1)};
}

// Rows [first, first + n) of one kv head, and the keys each may see.
struct Block {
  int64_t b, h, first, n;
  int64_t lo[kMaxRows], hi[kMaxRows];
  int64_t lo_all, hi_all; // their union; lo_all >= hi_all: nobody sees anything
};

inline void fill_block(const Problem &problem, int64_t b, int64_t h,
                       int64_t first, int64_t n, Block &block) {
  const AttentionParams &p = problem.p;
  block.b = b;
  block.h = h;
  block.first = first;
  block.n = n;
  block.lo_all = INT64_MAX;
  block.hi_all = INT64_MIN;
  const int64_t kv_len = p.kv_len[b], k_base = p.k_base ? p.k_base[b] : 0;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t column = (first + r) / problem.group;
    const int64_t kv_start =
        p.kv_start ? p.kv_start[b * p.q_length + column] : 0;
    KeyRange seen =
        visible_keys(p.q_start[b] + column, kv_len, kv_start, k_base, p.window);
    // A buffer holds the last `capacity` positions and no others.
    seen.lo = max64(seen.lo, kv_len - p.capacity);
    if (seen.lo >= seen.hi)
      seen = {0, 0};
    block.lo[r] = seen.lo;
    block.hi[r] = seen.hi;
    if (seen.lo < seen.hi) {
      block.lo_all = min64(block.lo_all, seen.lo);
      block.hi_all = max64(block.hi_all, seen.hi);
    }
  }
  if (block.lo_all > block.hi_all)
    block.lo_all = block.hi_all = 0;
}

inline int64_t first_split(const Block &block) { return block.lo_all / kSplit; }
inline int64_t end_split(const Block &block) {
  return (block.hi_all + kSplit - 1) / kSplit;
}

// ---- One tile: which keys each row sees of it, and where the keys lie ----

constexpr int64_t kMaxStrips = (kMaxRows + kTileRows - 1) / kTileRows;

struct Tile {
  int64_t start; // position of its first key
  int begin[kMaxRows],
      end[kMaxRows]; // row r sees keys [begin, end) of the tile
  // The same for strips of kTileRows rows, as unions; begin >= end: skipped.
  int strip_begin[kMaxStrips], strip_end[kMaxStrips];
  uint64_t seen;        // bit j: some row sees key j
  const char *k[kTile]; // null unless seen
  const char *v[kTile];
};

template <typename T>
inline void fill_tile(const Problem &problem, const Block &block, int64_t start,
                      Tile &tile) {
  const AttentionParams &p = problem.p;
  tile.start = start;
  tile.seen = 0;
  for (int64_t strip = 0; strip * kTileRows < block.n; ++strip) {
    int first = kTile, last = 0;
    for (int64_t r = strip * kTileRows;
         r < min64(block.n, (strip + 1) * kTileRows); ++r) {
      const int begin = (int)min64(max64(block.lo[r] - start, 0), kTile);
      const int end = (int)min64(max64(block.hi[r] - start, 0), kTile);
      tile.begin[r] = begin;
      tile.end[r] = end;
      if (begin >= end)
        continue;
      first = begin < first ? begin : first;
      last = end > last ? end : last;
      const uint64_t below_end = end == kTile ? ~0ull : (1ull << end) - 1;
      tile.seen |= below_end & ~((1ull << begin) - 1);
    }
    tile.strip_begin[strip] = first;
    tile.strip_end[strip] = last;
  }
  if (tile.seen == 0)
    return;
  const int64_t base = p.k_base ? p.k_base[block.b] : 0;
  const T *k = static_cast<const T *>(p.k) + block.b * p.k_strides.b +
               block.h * p.k_strides.h;
  const T *v = static_cast<const T *>(p.v) + block.b * p.v_strides.b +
               block.h * p.v_strides.h;
  int64_t slot = -1;
  for (int64_t j = 0; j < kTile; ++j) {
    if ((tile.seen >> j & 1) == 0) {
      tile.k[j] = tile.v[j] = nullptr;
      slot = -1;
      continue;
    }
    slot = slot < 0 ? slot_of(start + j, base, p.capacity) : slot + 1;
    if (slot == p.capacity)
      slot = 0;
    tile.k[j] = reinterpret_cast<const char *>(k + slot * p.k_strides.s);
    tile.v[j] = reinterpret_cast<const char *>(v + slot * p.v_strides.s);
  }
}

// K of the tile as B of Q K: for each 64 of head_dim, panels of keys, [D /
// 64][64 / kPanel][64][kPanel].
template <typename T>
inline void pack_keys(const Tile &tile, int64_t head_dim, float *out) {
  for (int64_t key = 0; key < kTile; key += kLanes) {
    float *panel = out + (key / kPanel) * 64 * kPanel + key % kPanel;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      vf32 row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T *k = reinterpret_cast<const T *>(tile.k[key + i]);
        row[i] = k == nullptr ? vf32{} : load(k + d);
      }
      transpose(row);
      float *to = panel + (d / 64) * 64 * kTile + (d % 64) * kPanel;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        store(to + i * kPanel, row[i]);
    }
  }
}

// V of the tile as B of P V: [D / kPanel][64][kPanel].
template <typename T>
inline void pack_values(const Tile &tile, int64_t head_dim, float *out) {
  for (int64_t j = 0; j < kTile; ++j) {
    const T *v = reinterpret_cast<const T *>(tile.v[j]);
    for (int64_t d = 0; d < head_dim; d += kPanel) {
      float *to = out + d * kTile + j * kPanel;
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i)
        store(to + i * kLanes,
              v == nullptr ? vf32{} : load(v + d + i * kLanes));
    }
  }
}

// ---- Scores to probabilities, one row of a tile, in place ----

inline vi32 lane_numbers() {
  vi32 lanes;
  for (int i = 0; i < kLanes; ++i)
    lanes[i] = i;
  return lanes;
}

// Only vectors that hold a key of [begin, end) are touched; in them, other keys
// get p = 0. l: kLanes partial sums. Not inlined: prefill and decode must run
// the very same instructions.
__attribute__((noinline)) void probabilities(const Problem &problem, float *s,
                                             int begin, int end, float *l) {
  const vi32 lanes = lane_numbers();
  vf32 sum = load(l);
  for (int j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const vi32 key = lanes + j;
    vf32 p = exp2(tanh(load(s + j) * problem.tanh_scale) * problem.exp2_scale);
    p = ((key >= begin) & (key < end)) ? p : splat(0.f);
    store(s + j, p);
    sum += p;
  }
  store(l, sum);
}

// The same with a running maximum m. Gives the factor by which earlier sums
// shrink.
__attribute__((noinline)) float probabilities_online(const Problem &problem,
                                                     float *s, int begin,
                                                     int end, float *l,
                                                     float *m) {
  const vi32 lanes = lane_numbers();
  vf32 highest = splat(*m);
  for (int j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const vi32 key = lanes + j;
    vf32 x = load(s + j) * problem.tanh_scale;
    if (problem.softcap > 0)
      x = tanh(x);
    x *= problem.exp2_scale;
    x = ((key >= begin) & (key < end)) ? x : splat(-kInfinity);
    store(s + j, x);
    highest = vmax(x, highest);
  }
  const float m_new = reduce_max(highest);
  const float offset = m_new == -kInfinity ? 0.f : m_new;
  const float shrink = *m == m_new ? 1.f : exp2(splat(*m - offset))[0];
  vf32 sum = load(l) * shrink;
  for (int j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const vf32 p = exp2(load(s + j) - offset);
    store(s + j, p);
    sum += p;
  }
  store(l, sum);
  *m = m_new;
  return shrink;
}

inline void scale_row(float *o, float by, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes)
    store(o + d, load(o + d) * by);
}

// total += part, for a split that has been summed alone.
template <bool kOnline>
inline void add_sums(const Sums &total, const Sums &part, int64_t rows,
                     int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    float *to = total.o + r * head_dim;
    const float *from = part.o + r * head_dim;
    if (!kOnline) {
      total.l[r] += part.l[r];
      for (int64_t d = 0; d < head_dim; d += kLanes)
        store(to + d, load(to + d) + load(from + d));
      continue;
    }
    if (part.l[r] == 0)
      continue; // no key of this split; NaN goes on
    const float m = total.m[r] > part.m[r] ? total.m[r] : part.m[r];
    const float a = total.m[r] == m ? 1.f : exp2(splat(total.m[r] - m))[0];
    const float b = part.m[r] == m ? 1.f : exp2(splat(part.m[r] - m))[0];
    total.m[r] = m;
    total.l[r] = total.l[r] * a + part.l[r] * b;
    for (int64_t d = 0; d < head_dim; d += kLanes)
      store(to + d, load(to + d) * a + load(from + d) * b);
  }
}

// ---- One split by packed tiles ----

struct Workspace {
  float *q, *s, *k, *v,
      *lanes; // [rows, D], [rows, 64], packed tiles, [rows, kLanes]
  Sums split;
  static int64_t floats(int64_t rows, int64_t head_dim) {
    return rows * (head_dim + kTile + kLanes) + 2 * kTile * head_dim +
           sums_floats(rows, head_dim);
  }
  Workspace(float *at, int64_t rows, int64_t head_dim) {
    k = at;
    v = k + kTile * head_dim;
    q = v + kTile * head_dim;
    s = q + rows * head_dim;
    lanes = s + rows * kTile;
    split = sums_at(lanes + rows * kLanes, rows, head_dim);
  }
};

template <bool kOnline>
void softmax_rows(const Problem &problem, const Workspace &w, const Tile &tile,
                  int64_t begin, int64_t end, int64_t strip) {
  const int64_t head_dim = problem.p.head_dim;
  for (int64_t r = begin; r < end; ++r) {
    float *s = w.s + r * kTile;
    if (tile.begin[r] >= tile.end[r]) {
      memset(s, 0, kTile * sizeof(float));
      continue;
    }
    float *l = w.lanes + r * kLanes;
    if (kOnline) {
      const float shrink = probabilities_online(problem, s, tile.begin[r],
                                                tile.end[r], l, w.split.m + r);
      if (shrink != 1.f)
        scale_row(w.split.o + r * head_dim, shrink, head_dim);
    } else {
      probabilities(problem, s, tile.begin[r], tile.end[r], l);
    }
    // P V runs over the strip's keys: those of other rows in vectors that this
    // row has not touched.
    const int touched = tile.begin[r] / kLanes * kLanes;
    const int touched_end = (tile.end[r] + kLanes - 1) / kLanes * kLanes;
    for (int j = tile.strip_begin[strip]; j < touched; ++j)
      s[j] = 0;
    for (int j = touched_end; j < tile.strip_end[strip]; ++j)
      s[j] = 0;
  }
}

template <typename T, bool kOnline>
void tiled_split(const Problem &problem, const Block &block, int64_t split,
                 const Workspace &w, Tile &tile) {
  const int64_t head_dim = problem.p.head_dim, n = block.n;
  const int64_t begin = max64(split * kSplit, block.lo_all / kTile * kTile);
  const int64_t end = min64((split + 1) * kSplit, block.hi_all);
  for (int64_t start = begin; start < end; start += kTile) {
    fill_tile<T>(problem, block, start, tile);
    if (tile.seen == 0)
      continue;
    pack_keys<T>(tile, head_dim, w.k);
    for (int64_t d = 0; d < head_dim; d += 64)
      for (int64_t key = 0; key < kTile; key += kPanel)
        for (int64_t r = 0, strip = 0; r < n; r += kTileRows, ++strip) {
          if (tile.strip_begin[strip] >= key + kPanel ||
              tile.strip_end[strip] <= key)
            continue;
          panel_product(min64(kTileRows, n - r), 64, w.q + r * head_dim + d,
                        head_dim, w.k + d * kTile + key * 64,
                        w.s + r * kTile + key, kTile, d > 0);
        }
    for (int64_t r = 0, strip = 0; r < n; r += kTileRows, ++strip)
      if (tile.strip_begin[strip] < tile.strip_end[strip])
        softmax_rows<kOnline>(problem, w, tile, r, min64(n, r + kTileRows),
                              strip);
    pack_values<T>(tile, head_dim, w.v);
    for (int64_t d = 0; d < head_dim; d += kPanel)
      for (int64_t r = 0, strip = 0; r < n; r += kTileRows, ++strip) {
        const int64_t first = tile.strip_begin[strip],
                      last = tile.strip_end[strip];
        if (first >= last)
          continue;
        panel_product(min64(kTileRows, n - r), last - first,
                      w.s + r * kTile + first, kTile,
                      w.v + d * kTile + first * kPanel,
                      w.split.o + r * head_dim + d, head_dim, true);
      }
  }
}

// ---- One split by dot products along head_dim: few rows, the keys read once
// ----

// s[r][j] = q[r] . k[j] for kKeys keys.
template <int kRows, int kKeys, typename T>
inline void dot_keys(const float *q, const char *const *keys, int64_t head_dim,
                     float *s) {
  const T *k[kKeys];
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j)
    k[j] = reinterpret_cast<const T *>(keys[j]);
  vf32 sum[kRows][kKeys] = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    vf32 key[kKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j)
      key[j] = load(k[j] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vf32 x = load(q + r * head_dim + d);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j)
        sum[r][j] += x * key[j];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kKeys; ++j)
      s[r * kTile + j] = reduce_add(sum[r][j]);
}

// o[r] += sum_j p[r][j] v[j] for kKeys keys.
template <int kRows, int kKeys, typename T>
inline void add_values(float *o, const char *const *values, int64_t head_dim,
                       const float *p) {
  const T *v[kKeys];
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j)
    v[j] = reinterpret_cast<const T *>(values[j]);
  vf32 weight[kRows][kKeys];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j)
      weight[r][j] = splat(p[r * kTile + j]);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    vf32 value[kKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j)
      value[j] = load(v[j] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      vf32 sum = load(o + r * head_dim + d);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j)
        sum += weight[r][j] * value[j];
      store(o + r * head_dim + d, sum);
    }
  }
}

// One pass over the keys [begin, end) of a tile for kRows rows.
template <int kRows, typename T>
void dot_rows(const Tile &tile, const float *q, int64_t head_dim, int begin,
              int end, float *s) {
  int j = begin;
  for (; j + 4 <= end; j += 4)
    dot_keys<kRows, 4, T>(q, tile.k + j, head_dim, s + j);
  for (; j < end; ++j)
    dot_keys<kRows, 1, T>(q, tile.k + j, head_dim, s + j);
}
template <int kRows, typename T>
void value_rows(const Tile &tile, float *o, int64_t head_dim, int begin,
                int end, const float *p) {
  int j = begin;
  for (; j + 4 <= end; j += 4)
    add_values<kRows, 4, T>(o, tile.v + j, head_dim, p + j);
  for (; j < end; ++j)
    add_values<kRows, 1, T>(o, tile.v + j, head_dim, p + j);
}

template <typename T, bool kOnline>
void direct_split(const Problem &problem, const Block &block, int64_t split,
                  const Workspace &w, Tile &tile) {
  // What a key that nobody sees is read as.
  alignas(64) static const char zeros[kMaxHeadDim * 4] = {};
  const int64_t head_dim = problem.p.head_dim, n = block.n;
  const int64_t begin = max64(split * kSplit, block.lo_all / kTile * kTile);
  const int64_t end = min64((split + 1) * kSplit, block.hi_all);
  for (int64_t start = begin; start < end; start += kTile) {
    fill_tile<T>(problem, block, start, tile);
    if (tile.seen == 0)
      continue;
    const int first = __builtin_ctzll(tile.seen),
              last = 64 - __builtin_clzll(tile.seen);
    for (int j = first; j < last; ++j)
      if (tile.k[j] == nullptr)
        tile.k[j] = tile.v[j] = zeros;
    for (int64_t r = 0; r < n; r += 4) {
      const float *q = w.q + r * head_dim;
      float *s = w.s + r * kTile;
      switch (min64(4, n - r)) {
      case 1:
        dot_rows<1, T>(tile, q, head_dim, first, last, s);
        break;
      case 2:
        dot_rows<2, T>(tile, q, head_dim, first, last, s);
        break;
      case 3:
        dot_rows<3, T>(tile, q, head_dim, first, last, s);
        break;
      default:
        dot_rows<4, T>(tile, q, head_dim, first, last, s);
      }
    }
    // The strips of this tile become one: every row's p must be there from
    // `first` to `last`.
    tile.strip_begin[0] = first;
    tile.strip_end[0] = last;
    softmax_rows<kOnline>(problem, w, tile, 0, n, 0);
    for (int64_t r = 0; r < n; r += 4) {
      float *o = w.split.o + r * head_dim;
      const float *p = w.s + r * kTile;
      switch (min64(4, n - r)) {
      case 1:
        value_rows<1, T>(tile, o, head_dim, first, last, p);
        break;
      case 2:
        value_rows<2, T>(tile, o, head_dim, first, last, p);
        break;
      case 3:
        value_rows<3, T>(tile, o, head_dim, first, last, p);
        break;
      default:
        value_rows<4, T>(tile, o, head_dim, first, last, p);
      }
    }
  }
}

// ---- A block: its queries in, its splits, its result out ----

struct RowPlace {
  int64_t head, column;
};
inline RowPlace place_of(const Problem &problem, const Block &block,
                         int64_t r) {
  const int64_t row = block.first + r;
  return {block.h * problem.group + row % problem.group, row / problem.group};
}

inline void load_queries(const Problem &problem, const Block &block, float *q) {
  const AttentionParams &p = problem.p;
  dispatch(p.q_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t r = 0; r < block.n; ++r) {
      const RowPlace at = place_of(problem, block, r);
      const T *from = static_cast<const T *>(p.q) + block.b * p.q_strides.b +
                      at.head * p.q_strides.h + at.column * p.q_strides.s;
      for (int64_t d = 0; d < p.head_dim; d += kLanes)
        store(q + r * p.head_dim + d, load(from + d));
    }
  });
}

inline void store_result(const Problem &problem, const Block &block,
                         const Sums &sums) {
  const AttentionParams &p = problem.p;
  dispatch(p.q_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t r = 0; r < block.n; ++r) {
      const RowPlace at = place_of(problem, block, r);
      T *to = static_cast<T *>(p.out) + block.b * p.out_strides.b +
              at.head * p.out_strides.h + at.column * p.out_strides.s;
      const float l = sums.l[r];
      const bool empty = l == 0; // NaN is not empty
      const float *o = sums.o + r * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += kLanes)
        store(to + d, empty ? vf32{} : load(o + d) / l);
      const float m = sums.m[r] == -kInfinity
                          ? 0.f
                          : sums.m[r]; // -inf: no maximum was kept
      p.lse[(block.b * p.q_heads + at.head) * p.q_length + at.column] =
          empty ? -kInfinity : (float)(m * kLn2 + __builtin_log((double)l));
    }
  });
}

// Sums of one split into w.split, from nothing.
template <typename T, bool kOnline>
void one_split(const Problem &problem, const Block &block, int64_t split,
               bool direct, const Workspace &w, Tile &tile) {
  w.split.clear(block.n, problem.p.head_dim);
  memset(w.lanes, 0, block.n * kLanes * sizeof(float));
  if (direct)
    direct_split<T, kOnline>(problem, block, split, w, tile);
  else
    tiled_split<T, kOnline>(problem, block, split, w, tile);
  for (int64_t r = 0; r < block.n; ++r)
    w.split.l[r] = reduce_add(load(w.lanes + r * kLanes));
}

// Work items in the order in which they are taken: blocks of late queries
// first, since under causality they are the longest.
struct Items {
  int64_t blocks, block_rows, kv_heads, batch, rows;
  int64_t count() const { return blocks * kv_heads * batch; }
  void fill(const Problem &problem, int64_t item, Block &block) const {
    const int64_t heads = kv_heads * batch;
    const int64_t first = (blocks - 1 - item / heads) * block_rows;
    const int64_t head = item % heads;
    fill_block(problem, head / kv_heads, head % kv_heads, first,
               min64(block_rows, rows - first), block);
  }
};

// body(item, scratch) for items [0, n) on all threads, each taking the next one
// when it is free.
template <typename F>
inline void on_demand(int64_t n, int64_t scratch_floats, const F &body) {
  int64_t next = 0;
  parallel(min64(num_threads(), n), 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_floats);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= n)
        return;
      body(item, scratch.get());
    }
  });
}

template <typename T, bool kOnline> void run(const Problem &problem) {
  const AttentionParams &p = problem.p;
  const int64_t threads = num_threads(), head_dim = p.head_dim;
  const bool direct = problem.rows <= kDirectRows && !p.deterministic;
  Items items{1, min64(kMaxRows, problem.rows), p.kv_heads, p.batch,
              problem.rows};
  // Small blocks where there would be too few for the threads.
  const auto set_rows = [&](int64_t rows) {
    items.block_rows = rows;
    items.blocks = (problem.rows + rows - 1) / rows;
  };
  set_rows(items.block_rows);
  while (items.count() < 4 * threads && items.block_rows > 4 * kTileRows)
    set_rows((items.block_rows + 1) / 2);
  const int64_t rows = items.block_rows;
  const int64_t workspace = Workspace::floats(rows, head_dim);

  // Still too few: each split of 512 keys is an item of its own, added in order
  // afterwards.
  int64_t splits = 1;
  if (threads > 1 && items.count() < 4 * threads) {
    for (int64_t i = 0; i < items.count(); ++i) {
      Block block;
      items.fill(problem, i, block);
      splits = max64(splits, end_split(block) - first_split(block));
    }
    if (items.count() * splits * sums_floats(rows, head_dim) > (64 << 20) / 4)
      splits = 1;
  }

  if (splits == 1) {
    on_demand(items.count(), workspace + sums_floats(rows, head_dim),
              [&](int64_t i, float *at) {
                const Workspace w(at, rows, head_dim);
                const Sums total = sums_at(at + workspace, rows, head_dim);
                Block block;
                Tile tile;
                items.fill(problem, i, block);
                load_queries(problem, block, w.q);
                total.clear(block.n, head_dim);
                for (int64_t split = first_split(block);
                     split < end_split(block); ++split) {
                  one_split<T, kOnline>(problem, block, split, direct, w, tile);
                  add_sums<kOnline>(total, w.split, block.n, head_dim);
                }
                store_result(problem, block, total);
              });
    return;
  }

  const Scratch parts(items.count() * splits * sums_floats(rows, head_dim));
  const auto part = [&](int64_t i, int64_t split) {
    return sums_at(parts.get() +
                       (i * splits + split) * sums_floats(rows, head_dim),
                   rows, head_dim);
  };
  on_demand(items.count() * splits, workspace, [&](int64_t i, float *at) {
    Workspace w(at, rows, head_dim);
    Block block;
    Tile tile;
    items.fill(problem, i / splits, block);
    const int64_t split = first_split(block) + i % splits;
    if (split >= end_split(block))
      return;
    w.split = part(i / splits, i % splits);
    load_queries(problem, block, w.q);
    one_split<T, kOnline>(problem, block, split, direct, w, tile);
  });
  on_demand(
      items.count(), sums_floats(rows, head_dim), [&](int64_t i, float *at) {
        const Sums total = sums_at(at, rows, head_dim);
        Block block;
        items.fill(problem, i, block);
        total.clear(block.n, head_dim);
        for (int64_t s = 0; s < end_split(block) - first_split(block); ++s)
          add_sums<kOnline>(total, part(i, s), block.n, head_dim);
        store_result(problem, block, total);
      });
}

} // namespace

void attention(const AttentionParams &p) {
  if (p.batch == 0 || p.q_heads == 0 || p.q_length == 0)
    return;
  const float softcap = mutated(Mutation::cap_dropped) ? 0.f : p.softcap;
  const int64_t group = p.q_heads / p.kv_heads;
  const Problem problem{
      .p = p,
      .group = group,
      .rows = p.q_length * group,
      .tanh_scale = softcap > 0 ? p.scale / softcap : p.scale,
      .exp2_scale = softcap > 0 ? softcap * kLog2E : kLog2E,
      .softcap = softcap,
  };
  const bool online = !(softcap > 0 && softcap <= 64);
  dispatch(p.kv_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (online)
      run<T, true>(problem);
    else
      run<T, false>(problem);
  });
}

} // namespace gemma2::GEMMA2_ISA
