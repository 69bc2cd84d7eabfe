// attention: out = softmax(mask(cap tanh(scale q k / cap))) v, and the log-sum-exp of the capped
// scores.
//
// Prefill. A work item is a block of at most 192 rows (row = query x head of one group, so that the
// group shares its keys) against tiles of 64 keys that start at multiples of 64 of the position.
// Per tile: K is transposed into panels, S = Q K, p = exp(cap tanh(.)), V goes into panels, O += P
// V; both products are gemm.h's. Strips of 6 rows that see nothing of a tile are skipped, tiles
// that nobody sees are never read. With bf16 dot products, bfloat16 q, k and v are multiplied as
// they are, p is rounded to bfloat16 and summed as rounded; everything else is float32. Decode (at
// most 8 rows). The bytes of K and V are the limit: dot products along head_dim straight from the
// cache, 4 keys at a time, each key read once for the whole group.
//
// For 0 < softcap <= 64 there is no running maximum (attention_softmax.h): p = exp(s), l = sum p,
// o = sum p v, out = o / l.
//
// Sums are made in splits of 512 keys aligned to the position, each alone, then added in order.
// Hence long contexts are split over threads without changing a bit, and with `deterministic`,
// which sends decode through prefill's products, a row's bits depend on nothing but its own query
// and keys.
//
// Measured on an EPYC (Zen 4, 117 GFLOP/s float32 and 235 bf16 a core), machine shared, 2026-11-24,
// 8/4 heads of 256, causal, cap 50: 2048 tokens, one core: 76 GFLOP/s float32, 132 bfloat16, 76
// with AVX2; 512 tokens, two cores, best: 120 and 240. The products take two thirds of it at 90% of
// the peak, packing a fifth, the softmax a sixteenth (float32) to a tenth (bf16). Decode over 4096
// keys, one core: bfloat16 0.8 ms (22 GB/s), float32 2.8 ms (12 GB/s).
//
// Called by gemma2/ops/attention.py; reference: gemma2/reference.py.

#include "common/mutate.h"
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kSplit = 512;     // keys, summed alone
constexpr int64_t kDirectRows = 8;  // at most: decode's path
// Floats to add: fewer are added sooner than threads wake up.
constexpr int64_t kWorthThreads = 1 << 17;
constexpr double kLn2 = 0.693147180559945309;
static_assert(kSplit % kTile == 0, "tiles fill splits");

inline int64_t first_split(const Block& block) { return block.lo_all / kSplit; }
inline int64_t end_split(const Block& block) { return (block.hi_all + kSplit - 1) / kSplit; }

// ---- Sums ----

// Over some keys: o[rows, D] = sum p v; l[rows] = sum p as it went into o, which normalises;
// exact[rows] = sum p before it was rounded, for the lse; the maximum m[rows] (base 2), if kept.
struct Sums {
  float *o, *l, *exact, *m;
  void clear(int64_t rows, int64_t head_dim) const {
    memset(o, 0, rows * head_dim * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      l[r] = exact[r] = 0;
      m[r] = -kInfinity;
    }
  }
};
constexpr int64_t sums_floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 3); }
inline Sums sums_at(float* at, int64_t rows, int64_t head_dim) {
  float* l = at + rows * head_dim;
  return {at, l, l + rows, l + 2 * rows};
}

inline void scale_row(float* o, float by, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) store(o + d, load(o + d) * by);
}

// total += part, for a split that has been summed alone.
template <bool kOnline>
inline void add_sums(const Sums& total, const Sums& part, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = total.o + r * head_dim;
    const float* from = part.o + r * head_dim;
    if (!kOnline) {
      total.l[r] += part.l[r];
      total.exact[r] += part.exact[r];
      for (int64_t d = 0; d < head_dim; d += kLanes) store(to + d, load(to + d) + load(from + d));
      continue;
    }
    if (part.l[r] == 0) continue;  // no key of this split; NaN goes on
    const float m = total.m[r] > part.m[r] ? total.m[r] : part.m[r];
    const float a = total.m[r] == m ? 1.f : exp2(splat(total.m[r] - m))[0];
    const float b = part.m[r] == m ? 1.f : exp2(splat(part.m[r] - m))[0];
    total.m[r] = m;
    total.l[r] = total.l[r] * a + part.l[r] * b;
    total.exact[r] = total.exact[r] * a + part.exact[r] * b;
    for (int64_t d = 0; d < head_dim; d += kLanes)
      store(to + d, load(to + d) * a + load(from + d) * b);
  }
}

// ---- Scratch of a thread ----

struct Workspace {
  // Packed tiles, rows of words, [rows, 64], [rows, 64], [rows, 2 kLanes]
  float *k, *v, *q, *s, *p, *lanes;
  Sums split;
  static int64_t floats(int64_t rows, int64_t head_dim) {
    return rows * (head_dim + 2 * kTile + 2 * kLanes) + 2 * kTile * head_dim +
           sums_floats(rows, head_dim);
  }
  Workspace(float* at, int64_t rows, int64_t head_dim) {
    k = at;
    v = k + kTile * head_dim;
    q = v + kTile * head_dim;
    s = q + rows * head_dim;
    p = s + rows * kTile;
    lanes = p + rows * kTile;
    split = sums_at(lanes + rows * 2 * kLanes, rows, head_dim);
  }
};

// Scores of rows [begin, end) of the tile to probabilities, which will be read from key `first` to
// `last`.
template <typename P, bool kOnline>
__attribute__((noinline)) void softmax_rows(const Problem& problem, const Workspace& w,
                                            const Tile& tile, int64_t begin, int64_t end, int first,
                                            int last) {
  const int64_t head_dim = problem.p.head_dim;
  P* probability = reinterpret_cast<P*>(w.p);
  for (int64_t r = begin; r < end; ++r) {
    P* p = probability + r * kTile;
    if (tile.begin[r] >= tile.end[r]) {
      memset(p, 0, kTile * sizeof(P));
      continue;
    }
    float *s = w.s + r * kTile, *l = w.lanes + r * 2 * kLanes;
    if (kOnline) {
      const float shrink =
          probabilities_online(problem.scales, s, p, tile.begin[r], tile.end[r], l, w.split.m + r);
      if (shrink != 1.f) scale_row(w.split.o + r * head_dim, shrink, head_dim);
    } else {
      probabilities(problem.scales, s, p, tile.begin[r], tile.end[r], l);
    }
    // Keys of other rows, in vectors that this row has not touched.
    const int touched = tile.begin[r] / kLanes * kLanes;
    const int touched_end = (tile.end[r] + kLanes - 1) / kLanes * kLanes;
    if (first < touched) memset(p + first, 0, (touched - first) * sizeof(P));
    if (touched_end < last) memset(p + touched_end, 0, (last - touched_end) * sizeof(P));
  }
}

// ---- One split by packed tiles ----

template <typename T, typename Word, bool kOnline>
void tiled_split(const Problem& problem, const Block& block, int64_t split, const Workspace& w,
                 Tile& tile) {
  constexpr int64_t kPer = Word::kPerWord, kKeyWords = kTile / kPer;
  const int64_t head_dim = problem.p.head_dim, n = block.n;
  const int64_t words = head_dim / kPer, chunk = min64(Word::kChain, words);
  const int64_t begin = max64(split * kSplit, block.lo_all / kTile * kTile);
  const int64_t end = min64((split + 1) * kSplit, block.hi_all);
  for (int64_t start = begin; start < end; start += kTile) {
    fill_tile<T>(problem, block, start, tile);
    if (tile.seen == 0) continue;
    pack_keys<T, Word>(tile, words, w.k);
    for (int64_t i = 0; i < words; i += chunk)
      for (int64_t key = 0; key < kTile; key += kPanel)
        for (int64_t r = 0, strip = 0; r < n; r += kTileRows, ++strip) {
          if (tile.strip_begin[strip] >= key + kPanel || tile.strip_end[strip] <= key) continue;
          panel_product<Word>(min64(kTileRows, n - r), min64(kPanel, tile.strip_end[strip] - key),
                              chunk, w.q + r * words + i, words, w.k + i * kTile + key * chunk,
                              w.s + r * kTile + key, kTile, i > 0);
        }
    // From and to even keys, where two share a word.
    for (int64_t r = 0, strip = 0; r < n; r += kTileRows, ++strip)
      if (tile.strip_begin[strip] < tile.strip_end[strip])
        softmax_rows<typename Operands<Word>::Probability, kOnline>(
            problem, w, tile, r, min64(n, r + kTileRows), tile.strip_begin[strip] / kPer * kPer,
            (tile.strip_end[strip] + kPer - 1) / kPer * kPer);
    pack_values<T, Word>(tile, head_dim, w.v);
    for (int64_t d = 0; d < head_dim; d += kPanel)
      for (int64_t r = 0, strip = 0; r < n; r += kTileRows, ++strip) {
        const int64_t first = tile.strip_begin[strip] / kPer;
        const int64_t last = (tile.strip_end[strip] + kPer - 1) / kPer;
        if (first >= last) continue;
        panel_product<Word>(
            min64(kTileRows, n - r), kPanel, last - first, w.p + r * kKeyWords + first, kKeyWords,
            w.v + d * kKeyWords + first * kPanel, w.split.o + r * head_dim + d, head_dim, true);
      }
  }
}

// ---- One split by dot products along head_dim: few rows, the keys read once ----

// Rows of K and V between the one that is read and the one that is fetched: without it, one core
// reads bfloat16 at a third of the speed (EPYC, Zen 4). `ahead`: the same in bytes.
constexpr int64_t kAhead = 8;

template <typename T>
inline vf32 load_and_prefetch(const T* p, int64_t d, int64_t ahead) {
  if (d * sizeof(T) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(p + d) + ahead);
  return load(p + d);
}

// s[r][j] = q[r] . k[j] for kKeys keys.
template <int kRows, int kKeys, typename T>
inline void dot_keys(const float* q, const char* const* keys, int64_t head_dim, int64_t ahead,
                     float* s) {
  const T* k[kKeys];
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j) k[j] = reinterpret_cast<const T*>(keys[j]);
  vf32 sum[kRows][kKeys] = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    vf32 key[kKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) key[j] = load_and_prefetch(k[j], d, ahead);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vf32 x = load(q + r * head_dim + d);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) sum[r][j] += x * key[j];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kKeys; ++j) s[r * kTile + j] = reduce_add(sum[r][j]);
}

// o[r] += sum_j p[r][j] v[j] for kKeys keys.
template <int kRows, int kKeys, typename T>
inline void add_values(float* o, const char* const* values, int64_t head_dim, int64_t ahead,
                       const float* p) {
  const T* v[kKeys];
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j) v[j] = reinterpret_cast<const T*>(values[j]);
  vf32 weight[kRows][kKeys];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) weight[r][j] = splat(p[r * kTile + j]);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    vf32 value[kKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) value[j] = load_and_prefetch(v[j], d, ahead);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      vf32 sum = load(o + r * head_dim + d);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) sum += weight[r][j] * value[j];
      store(o + r * head_dim + d, sum);
    }
  }
}

// The keys [begin, end) of a tile for kRows rows: scores, and later the sum of values.
template <int kRows, typename T>
void dot_rows(const Tile& tile, const float* q, int64_t head_dim, int64_t ahead, int begin, int end,
              float* s) {
  int j = begin;
  for (; j + 4 <= end; j += 4) dot_keys<kRows, 4, T>(q, tile.k + j, head_dim, ahead, s + j);
  for (; j < end; ++j) dot_keys<kRows, 1, T>(q, tile.k + j, head_dim, ahead, s + j);
}
template <int kRows, typename T>
void value_rows(const Tile& tile, float* o, int64_t head_dim, int64_t ahead, int begin, int end,
                const float* p) {
  int j = begin;
  for (; j + 4 <= end; j += 4) add_values<kRows, 4, T>(o, tile.v + j, head_dim, ahead, p + j);
  for (; j < end; ++j) add_values<kRows, 1, T>(o, tile.v + j, head_dim, ahead, p + j);
}

template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};

// f(first row, RowCount<1..4>) until n rows are done.
template <typename F>
inline void by_four_rows(int64_t n, const F& f) {
  for (int64_t r = 0; r < n; r += 4) {
    switch (min64(4, n - r)) {
      case 1:
        f(r, RowCount<1>{});
        break;
      case 2:
        f(r, RowCount<2>{});
        break;
      case 3:
        f(r, RowCount<3>{});
        break;
      default:
        f(r, RowCount<4>{});
    }
  }
}

template <typename T, bool kOnline>
void direct_split(const Problem& problem, const Block& block, int64_t split, const Workspace& w,
                  Tile& tile) {
  // What a key that nobody sees is read as.
  alignas(64) static const char zeros[kMaxHeadDim * sizeof(float)] = {};
  const int64_t k_ahead = kAhead * problem.p.k_strides.s * (int64_t)sizeof(T);
  const int64_t v_ahead = kAhead * problem.p.v_strides.s * (int64_t)sizeof(T);
  const int64_t head_dim = problem.p.head_dim, n = block.n;
  const int64_t begin = max64(split * kSplit, block.lo_all / kTile * kTile);
  const int64_t end = min64((split + 1) * kSplit, block.hi_all);
  for (int64_t start = begin; start < end; start += kTile) {
    fill_tile<T>(problem, block, start, tile);
    if (tile.seen == 0) continue;
    const int first = __builtin_ctzll(tile.seen), last = 64 - __builtin_clzll(tile.seen);
    for (int j = first; j < last; ++j)
      if (tile.k[j] == nullptr) tile.k[j] = tile.v[j] = zeros;
    by_four_rows(n, [&](int64_t r, auto rows) {
      dot_rows<decltype(rows)::value, T>(tile, w.q + r * head_dim, head_dim, k_ahead, first, last,
                                         w.s + r * kTile);
    });
    softmax_rows<float, kOnline>(problem, w, tile, 0, n, first, last);
    by_four_rows(n, [&](int64_t r, auto rows) {
      value_rows<decltype(rows)::value, T>(tile, w.split.o + r * head_dim, head_dim, v_ahead, first,
                                           last, w.p + r * kTile);
    });
  }
}

// ---- A block: its queries in, its splits, its result out ----

template <typename Word>
inline void load_queries(const Problem& problem, const Block& block, float* q) {
  const AttentionParams& p = problem.p;
  dispatch(p.q_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if constexpr (requires { Operands<Word>::pack_query((const T*)nullptr, 0, q); })
      for (int64_t r = 0; r < block.n; ++r) {
        const RowPlace at = place_of(problem, block, r);
        const T* from = static_cast<const T*>(p.q) + block.b * p.q_strides.b +
                        at.head * p.q_strides.h + at.column * p.q_strides.s;
        Operands<Word>::pack_query(from, p.head_dim, q + r * (p.head_dim / Word::kPerWord));
      }
  });
}

inline void store_result(const Problem& problem, const Block& block, const Sums& sums) {
  const AttentionParams& p = problem.p;
  dispatch(p.q_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t r = 0; r < block.n; ++r) {
      const RowPlace at = place_of(problem, block, r);
      T* to = static_cast<T*>(p.out) + block.b * p.out_strides.b + at.head * p.out_strides.h +
              at.column * p.out_strides.s;
      const float l = sums.l[r];
      const bool empty = l == 0;  // NaN is not empty
      const float* o = sums.o + r * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += kLanes)
        store(to + d, empty ? vf32{} : load(o + d) / l);
      const float m = sums.m[r] == -kInfinity ? 0.f : sums.m[r];  // -inf: no maximum was kept
      p.lse[(block.b * p.q_heads + at.head) * p.q_length + at.column] =
          empty ? -kInfinity : (float)(m * kLn2 + __builtin_log((double)sums.exact[r]));
    }
  });
}

// Sums of one split into w.split, from nothing.
template <typename T, typename Word, bool kOnline>
void one_split(const Problem& problem, const Block& block, int64_t split, bool direct,
               const Workspace& w, Tile& tile) {
  w.split.clear(block.n, problem.p.head_dim);
  memset(w.lanes, 0, block.n * 2 * kLanes * sizeof(float));
  if (direct)
    direct_split<T, kOnline>(problem, block, split, w, tile);
  else
    tiled_split<T, Word, kOnline>(problem, block, split, w, tile);
  for (int64_t r = 0; r < block.n; ++r) {
    w.split.l[r] = reduce_add(load(w.lanes + r * 2 * kLanes));
    w.split.exact[r] = reduce_add(load(w.lanes + r * 2 * kLanes + kLanes));
  }
}

// Work items in the order in which they are taken: blocks of late queries first, since under
// causality they are the longest.
struct Items {
  int64_t blocks, block_rows, kv_heads, batch, rows;
  int64_t count() const { return blocks * kv_heads * batch; }
  void set_rows(int64_t n) {
    block_rows = n;
    blocks = (rows + n - 1) / n;
  }
  void fill(const Problem& problem, int64_t item, Block& block) const {
    const int64_t heads = kv_heads * batch;
    const int64_t first = (blocks - 1 - item / heads) * block_rows;
    const int64_t head = item % heads;
    fill_block(problem, head / kv_heads, head % kv_heads, first, min64(block_rows, rows - first),
               block);
  }
};

// body(item, scratch) for items [0, n) on all threads, each taking the next one when it is free.
template <typename F>
inline void on_demand(int64_t n, int64_t scratch_floats, const F& body) {
  int64_t next = 0;
  parallel(min64(num_threads(), n), 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_floats);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= n) return;
      body(item, scratch.get());
    }
  });
}

template <typename T, typename Word, bool kOnline>
void run(const Problem& problem, bool direct) {
  const AttentionParams& p = problem.p;
  const int64_t threads = num_threads(), head_dim = p.head_dim;
  Items items{1, 1, p.kv_heads, p.batch, problem.rows};
  items.set_rows(min64(kMaxRows, problem.rows));
  // Smaller blocks where there would be too few for the threads.
  while (threads > 1 && items.count() < 4 * threads && items.block_rows > 4 * kTileRows)
    items.set_rows((items.block_rows / 2 + kTileRows - 1) / kTileRows * kTileRows);
  const int64_t rows = items.block_rows;
  const int64_t workspace = Workspace::floats(rows, head_dim);
  const int64_t sums = sums_floats(rows, head_dim);

  // Still too few: each split of 512 keys is an item of its own, added in order afterwards.
  int64_t splits = 1;
  if (threads > 1 && items.count() < 4 * threads) {
    Block block;
    for (int64_t i = 0; i < items.count(); ++i) {
      items.fill(problem, i, block);
      splits = max64(splits, end_split(block) - first_split(block));
    }
    if (items.count() * splits * sums > (64 << 20) / 4) splits = 1;
  }

  if (splits == 1) {
    on_demand(items.count(), workspace + sums, [&](int64_t i, float* at) {
      const Workspace w(at, rows, head_dim);
      const Sums total = sums_at(at + workspace, rows, head_dim);
      Block block;
      Tile tile;
      items.fill(problem, i, block);
      load_queries<Word>(problem, block, w.q);
      total.clear(block.n, head_dim);
      for (int64_t split = first_split(block); split < end_split(block); ++split) {
        one_split<T, Word, kOnline>(problem, block, split, direct, w, tile);
        add_sums<kOnline>(total, w.split, block.n, head_dim);
      }
      store_result(problem, block, total);
    });
    return;
  }

  const Scratch parts(items.count() * splits * sums);
  const auto part = [&](int64_t i, int64_t split) {
    return sums_at(parts.get() + (i * splits + split) * sums, rows, head_dim);
  };
  on_demand(items.count() * splits, workspace, [&](int64_t i, float* at) {
    Workspace w(at, rows, head_dim);
    Block block;
    Tile tile;
    items.fill(problem, i / splits, block);
    const int64_t split = first_split(block) + i % splits;
    if (split >= end_split(block)) return;
    w.split = part(i / splits, i % splits);
    load_queries<Word>(problem, block, w.q);
    one_split<T, Word, kOnline>(problem, block, split, direct, w, tile);
  });
  const auto combine = [&](int64_t i, float* at) {
    const Sums total = sums_at(at, rows, head_dim);
    Block block;
    items.fill(problem, i, block);
    total.clear(block.n, head_dim);
    for (int64_t s = 0; s < end_split(block) - first_split(block); ++s)
      add_sums<kOnline>(total, part(i, s), block.n, head_dim);
    store_result(problem, block, total);
  };
  if (items.count() * splits * sums > kWorthThreads) return on_demand(items.count(), sums, combine);
  const Scratch total(sums);
  for (int64_t i = 0; i < items.count(); ++i) combine(i, total.get());
}

template <typename T, typename Word>
void run(const Problem& problem, bool online, bool direct) {
  if (online)
    run<T, Word, true>(problem, direct);
  else
    run<T, Word, false>(problem, direct);
}

}  // namespace

void attention(const AttentionParams& p) {
  if (p.batch == 0 || p.q_heads == 0 || p.q_length == 0) return;
  const float softcap = mutated(Mutation::cap_dropped) ? 0.f : p.softcap;
  const int64_t group = p.q_heads / p.kv_heads;
  const Problem problem{p, group, p.q_length * group, SoftmaxScales(p.scale, softcap)};
  const bool online = !(softcap > 0 && softcap <= 64);
  const bool direct = problem.rows <= kDirectRows && !p.deterministic;
#if defined(__AVX512BF16__)
  if (!direct && p.q_dtype == DType::bf16 && p.kv_dtype == DType::bf16)
    return run<bf16_t, Bf16Pair>(problem, online, direct);
#endif
  dispatch(p.kv_dtype,
           [&](auto t) { run<typename decltype(t)::type, Single>(problem, online, direct); });
}

}  // namespace gemma2::GEMMA2_ISA
