// attention, few rows a key/value head (decode, drafts to verify): out = softmax(mask(cap
// tanh(scale q k / cap))) v, by splits of the visible keys.
//
// 1. decode split: a block of 4 warps takes a split of a key/value head's keys. Its rows, at most
//    16, are queries x heads of the group, so keys and values are read once for all of them. Keys
//    go by in tiles of 32 (D = 256) or 64, as units of 16 KB (D = 64: 8 KB): a tile's K, then its
//    V. Four units have room; three are on their way while one is used; one barrier a unit.
//      K: a warp multiplies q (in registers) with its quarter of the keys, caps, masks and leaves
//         scores (base 2, float32) in shared memory.
//      V: every warp makes probabilities of all scores, which costs less than another barrier, and
//         adds p v for its quarter of D. So warps have no sums to exchange.
//    bfloat16 with 0 < cap <= 64 keeps no maximum: p = 2^score as it is. Else a running maximum.
// 2. decode combine: a block adds 32 columns of a row over its splits, 16 at a time, in a fixed
//    order. Where there is one split, the first launch writes the result.
//
// Splits share the keys that any row sees, a range that only the device knows: blocks without keys
// write zeros and end. Nothing outside the range is read, and values that no row sees count as 0,
// whatever their slots hold.
//
// Planned: 128 threads; 168 registers and 75 or 73 KB of shared memory at D = 256 and 128, 128
// registers and 39 KB at 64. So 3, 3 and 4 blocks are resident on sm_90 and sm_100, 2, 2 and 4 on
// sm_80, 1, 1 and 2 on sm_86; each keeps 48 to 64 KB (D = 64: half) under way.
//
// Bound by memory: 4 D bytes a key and key/value head, each moved once; partial sums are 4 (D + 4)
// bytes a row and split, written and read once. With short contexts, by the latency of two
// launches: hence small units, all copies started before the first wait, and loops that are not
// unrolled where they run once (instructions have to be fetched, too).
//
// Tried: the 8 copies of a unit in a loop of 2 or 4 save twenty registers at D = 128 and spill at
// 256.
//
// Called by csrc/cuda/attention.cu; the number of splits: csrc/common/attention_plan.h.

#include "common/attention_plan.h"
#include "common/mutate.h"
#include "common/visibility.h"
#include "cuda/attention_softmax.h"
#include "cuda/attention_sums.h"
#include "cuda/attention_tile.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"

namespace gemma2::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnits = 4;  // that shared memory holds

// Keys [begin, end), counted from the first that any row sees.
struct alignas(8) Range {
  int begin, end;
};

template <int kDim>
struct DecodeTile {
  static constexpr int kKeys = kDim == 256 ? 32 : 64;
  using Mask = std::conditional_t<kKeys == 32, uint32_t, uint64_t>;  // a bit a key
  static constexpr int kChunks = TileRows<kDim>::kChunks;            // of 16 bytes, in a row
  static constexpr int kRowStep = kThreads / kChunks;  // rows that the block copies at once
  static constexpr int kWarpKeys = kKeys / kWarps;     // of a warp, in the product with K
  static constexpr int kWarpDim = kDim / kWarps;       // of a warp, in the product with V
  static constexpr int kBlocks = kDim == 64 ? 4 : 3;   // wanted on a multiprocessor
  static constexpr int kScoreStride = kKeys + 8;       // so that rows of scores begin 8 banks apart

  struct alignas(128) Shared {
    unsigned char units[kUnits][kKeys * TileRows<kDim>::kBytes];
    unsigned char q[kRows * TileRows<kDim>::kBytes];
    float scores[kRows * kScoreStride];
    Range rows[kWarps][kRows];  // what each row sees of the split; every warp has its own copy
  };
};

struct Decode {
  AttentionParams p;
  SoftmaxScales scales;
  int kv_heads, rows, group, splits;
  int inverse_group;  // 256 / group, rounded up
  float* o;           // [batch * kv_heads, splits, rows, D]; null if there is one split
  Sums* sums;         // [batch * kv_heads, splits, rows]
};

// Rows are query by query: row r is head r % group of query r / group, which is exact for r < 16.
GEMMA2_DEVICE int query_of(const Decode& d, int row) { return row * d.inverse_group >> 8; }
GEMMA2_DEVICE int64_t head_of(const Decode& d, int64_t kv_head, int row) {
  return query_head(kv_head, row - query_of(d, row) * d.group, d.group, d.kv_heads);
}

// log2 of p, of a row that sees the key.
template <bool kOnline>
GEMMA2_DEVICE float exponent(float score, const SoftmaxScales& scales) {
  return kOnline && !scales.capped ? score * scales.exp2_scale : capped_exponent(score, scales);
}

// What a block works on.
struct Work {
  Range keys;
  int first_slot;  // of key 0
};

// A warp's; it writes what each of the 16 rows sees of the block's keys, if there are any.
GEMMA2_DEVICE Work work_of(const Decode& d, int64_t b, int split, int lane, Range* rows) {
  const AttentionParams& p = d.p;
  const int64_t kv_len = p.kv_len[b], k_base = p.k_base ? p.k_base[b] : 0;
  int64_t lo = INT64_MAX, hi = INT64_MIN;
  if (lane < p.q_length) {
    const int64_t kv_start = p.kv_start ? p.kv_start[b * p.q_length + lane] : 0;
    const KeyRange seen = visible_keys(p.q_start[b] + lane, kv_len, kv_start, k_base, p.window);
    const int64_t held = kv_len - p.capacity;  // the buffer holds no keys before it
    const int64_t first = seen.lo > held ? seen.lo : held;
    if (first < seen.hi) {
      lo = first;
      hi = seen.hi;
    }
  }
  int64_t first = lo, end = hi;
#pragma unroll 1
  for (int bits = 1; bits < p.q_length; bits *= 2) {
    const int64_t other_first = shuffle_xor(first, bits), other_end = shuffle_xor(end, bits);
    first = other_first < first ? other_first : first;
    end = other_end > end ? other_end : end;
  }
  first = shuffle(first, 0);
  end = shuffle(end, 0);
  Work work = {{0, 0}, 0};
  if (first >= end) return work;
  const int keys = static_cast<int>(end - first);
  work.keys = {split_begin(keys, d.splits, split), split_begin(keys, d.splits, split + 1)};
  work.first_slot = static_cast<int>(read_slot(first, k_base, p.capacity));
  Range sees = {0, 0};
  if (lo < hi)
    sees = {max(static_cast<int>(lo - first), work.keys.begin),
            min(static_cast<int>(hi - first), work.keys.end)};
#pragma unroll 1
  for (int row = lane * d.group; lane < p.q_length && row < (lane + 1) * d.group; ++row)
    store(&rows[row], sees);
  if (lane >= d.rows && lane < kRows) store(&rows[lane], Range{0, 0});
  sync_warp();
  return work;
}

// Bit j: some row sees key `begin` + j.
template <typename Tile>
GEMMA2_DEVICE typename Tile::Mask seen_keys(const Decode& d, const Range* rows, int begin,
                                            int lane) {
  typename Tile::Mask seen = 0;
#pragma unroll
  for (int half = 0; half < Tile::kKeys / kWarp; ++half) {
    const int key = begin + half * kWarp + lane;
    bool sees = false;
#pragma unroll 1
    for (int row = 0; row < d.rows; row += d.group) {
      const Range range = load(&rows[row]);
      sees |= key >= range.begin && key < range.end;
    }
    seen |= typename Tile::Mask{ballot(sees)} << half * kWarp;
  }
  return seen;
}

// Starts the copies of one unit: the rows `from` of the keys from `begin` on.
template <typename T, int kDim>
GEMMA2_DEVICE void copy_unit(unsigned char* unit, const T* from, int stride, const Work& work,
                             int begin, typename DecodeTile<kDim>::Mask seen, int capacity) {
  using Tile = DecodeTile<kDim>;
  const int chunk = threadIdx.x % Tile::kChunks, row = threadIdx.x / Tile::kChunks;
#pragma unroll
  for (int i = 0; i < Tile::kKeys; i += Tile::kRowStep) {
    const int r = row + i;
    const bool valid = seen >> r & 1;
    int slot = work.first_slot + begin + r;
    if (slot >= capacity) slot -= capacity;
    const T* key = valid ? from + int64_t{slot} * stride + chunk * 8 : from;
    copy_async<16>(unit + tile_offset<kDim>(r, chunk), key, valid);
  }
}

template <typename T, int kDim>
GEMMA2_DEVICE void copy_queries(unsigned char* q, const Decode& d, int64_t b, int64_t kv_head) {
  using Tile = DecodeTile<kDim>;
  const AttentionParams& p = d.p;
  const int chunk = threadIdx.x % Tile::kChunks;
  const T* from = static_cast<const T*>(p.q) + b * p.q_strides.b + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows; i += Tile::kRowStep) {
    const int r = threadIdx.x / Tile::kChunks + i;
    const bool valid = r < d.rows;
    const T* row = valid ? from + head_of(d, kv_head, r) * p.q_strides.h +
                               int64_t{query_of(d, r)} * p.q_strides.s
                         : from;
    copy_async<16>(q + tile_offset<kDim>(r, chunk), row, valid);
  }
}

// A thread's share while keys go by: of 16 rows, fragments have rows lane / 4 and lane / 4 + 8.
template <int kDim>
struct State {
  uint32_t q[kDim / 16][4];
  float o[DecodeTile<kDim>::kWarpDim / 8][4];
  SoftmaxState softmax;
};

template <typename T, int kDim, bool kOnline>
GEMMA2_DEVICE void multiply_keys(const Decode& d, const unsigned char* keys,
                                 const State<kDim>& state, float* scores, const Range* rows,
                                 int begin) {
  using Tile = DecodeTile<kDim>;
  constexpr int kTiles = Tile::kWarpKeys / 8;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * Tile::kWarpKeys;
  // A single tile of 8 keys is summed in two halves, so that products need not wait so long.
  float product[2][4] = {};
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t k[4];
      ldmatrix(k, keys + tile_offset<kDim>(first + n * 8 + lane % 8, i * 4 + lane / 8));
      mma_16x8x16<T>(product[n], state.q[2 * i], {k[0], k[1]});
      mma_16x8x16<T>(product[kTiles == 1 ? 1 : n], state.q[2 * i + 1], {k[2], k[3]});
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && d.rows <= 8) break;
    const int row = lane / 4 + half * 8;
    const Range range = load(&rows[row]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = first + n * 8 + lane % 4 * 2, key = begin + column;
      float s[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x = product[n][half * 2 + e];
        if (kTiles == 1) x += product[1][half * 2 + e];
        s[e] = key + e >= range.begin && key + e < range.end ? exponent<kOnline>(x, d.scales)
                                                             : -INFINITY;
      }
      store(reinterpret_cast<float2*>(&scores[row * Tile::kScoreStride + column]),
            float2{s[0], s[1]});
    }
  }
}

template <typename T, int kDim, bool kOnline>
GEMMA2_DEVICE void multiply_values(const Decode& d, const unsigned char* values, State<kDim>& state,
                                   const float* scores) {
  using Tile = DecodeTile<kDim>;
  constexpr int kSteps = Tile::kKeys / 16;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  SoftmaxState& softmax = state.softmax;
  uint32_t p[kSteps][4];  // A fragments
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && d.rows <= 8) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) p[i][1] = p[i][3] = 0;
      break;
    }
    const float* row = &scores[(lane / 4 + half * 8) * Tile::kScoreStride + lane % 4 * 2];
    float2 s[2 * kSteps];
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) s[i] = load(reinterpret_cast<const float2*>(row + i * 8));
    float offset = 0;
    if constexpr (kOnline) {
      float most = softmax.m[half];
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) most = fmaxf(most, fmaxf(s[i].x, s[i].y));
      most = max_warp<4>(most);
      offset = most == -INFINITY ? 0.0f : most;
      const float shrink = exp2_approx(softmax.m[half] - offset);
      softmax.m[half] = most;
      softmax.l[half] *= shrink;
      softmax.exact[half] *= shrink;
#pragma unroll
      for (int n = 0; n < Tile::kWarpDim / 8; ++n) {
        state.o[n][half * 2] *= shrink;
        state.o[n][half * 2 + 1] *= shrink;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float x = exp2_approx(s[i].x - offset), y = exp2_approx(s[i].y - offset);
      const uint32_t word = pack2<T>(x, y);
      softmax.exact[half] += x + y;
      softmax.l[half] += sum_of_rounded<T>(word);
      p[i / 2][i % 2 * 2 + half] = word;
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int n = 0; n < Tile::kWarpDim / 8; n += 2) {
      uint32_t v[2][2];
      load_values<kDim>(v[0], v[1], values, i * 16, (warp * Tile::kWarpDim + n * 8) / 16);
      mma_16x8x16<T>(state.o[n], p[i], v[0]);
      mma_16x8x16<T>(state.o[n + 1], p[i], v[1]);
    }
  }
}

// A row's elements [column, column + 2) of the result.
GEMMA2_DEVICE void store_pair(const AttentionParams& p, int64_t b, int64_t head, int64_t query,
                              int column, uint32_t pair) {
  uint16_t* out = static_cast<uint16_t*>(p.out) + b * p.out_strides.b + head * p.out_strides.h +
                  query * p.out_strides.s + column;
  store(reinterpret_cast<uint32_t*>(out), pair);
}

template <typename T, int kDim, bool kOnline>
__global__ void __launch_bounds__(kThreads, DecodeTile<kDim>::kBlocks) split_kernel(Decode d) {
  using Tile = DecodeTile<kDim>;
  auto& shared = dynamic_shared<typename Tile::Shared>();
  const AttentionParams& p = d.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x / d.kv_heads, kv_head = blockIdx.x % d.kv_heads;
  Range* rows = shared.rows[warp];
  const Work work = work_of(d, b, blockIdx.y, lane, rows);

  State<kDim> state = {};
  state.softmax = softmax_start();
  if (work.keys.begin < work.keys.end) {
    const T* k = static_cast<const T*>(p.k) + b * p.k_strides.b + kv_head * p.k_strides.h;
    const T* v = static_cast<const T*>(p.v) + b * p.v_strides.b + kv_head * p.v_strides.h;
    const int tiles = ceil_div(work.keys.end - work.keys.begin, Tile::kKeys);

    // Unit 2 t is K of tile t, unit 2 t + 1 its V. Each is a group of copies, empty after the last
    // tile.
    typename Tile::Mask seen = 0;
    const auto start_unit = [&](int unit) {
      const int begin = work.keys.begin + unit / 2 * Tile::kKeys;
      if (unit < 2 * tiles) {
        if (unit % 2 == 0) seen = seen_keys<Tile>(d, rows, begin, lane);
        copy_unit<T, kDim>(shared.units[unit % kUnits], unit % 2 == 0 ? k : v,
                           static_cast<int>(unit % 2 == 0 ? p.k_strides.s : p.v_strides.s), work,
                           begin, seen, static_cast<int>(p.capacity));
      }
      copy_async_commit();
    };
    copy_queries<T, kDim>(shared.q, d, b, kv_head);
#pragma unroll 1
    for (int unit = 0; unit < kUnits; ++unit) start_unit(unit);
    copy_async_wait<kUnits - 1>();
    sync_block();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) load_rows<kDim>(state.q[i], shared.q, 0, i);

    // Past a barrier, what was waited for is there, and all are done with the unit before.
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile > 0) {
        copy_async_wait<kUnits - 2>();
        sync_block();
        start_unit(2 * tile + kUnits - 1);
      }
      multiply_keys<T, kDim, kOnline>(d, shared.units[2 * tile % kUnits], state, shared.scores,
                                      rows, work.keys.begin + tile * Tile::kKeys);
      copy_async_wait<kUnits - 2>();
      sync_block();
      start_unit(2 * tile + kUnits);
      multiply_values<T, kDim, kOnline>(d, shared.units[2 * tile % kUnits + 1], state,
                                        shared.scores);
    }
  }

  finish(state.softmax);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = state.softmax.l[half], exact = state.softmax.exact[half];
    const float most = kOnline ? state.softmax.m[half] : 0.0f;
    const int row = lane / 4 + half * 8;
    if (row >= d.rows) continue;
    const int column = warp * Tile::kWarpDim + lane % 4 * 2;
    const int64_t query = query_of(d, row), head = head_of(d, kv_head, row);
    const bool first = warp == 0 && lane % 4 == 0;
    if (d.splits == 1) {
      const float scale = sum == 0 ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int n = 0; n < Tile::kWarpDim / 8; ++n)
        store_pair(p, b, head, query, column + n * 8,
                   pack2<T>(state.o[n][half * 2] * scale, state.o[n][half * 2 + 1] * scale));
      if (first)
        store(&p.lse[(b * p.q_heads + head) * p.q_length + query], log_sum_exp(sum, exact, most));
      continue;
    }
    const int64_t at = (int64_t{blockIdx.x} * d.splits + blockIdx.y) * d.rows + row;
#pragma unroll
    for (int n = 0; n < Tile::kWarpDim / 8; ++n)
      store(reinterpret_cast<float2*>(d.o + at * kDim + column + n * 8),
            float2{state.o[n][half * 2], state.o[n][half * 2 + 1]});
    if (first) store(reinterpret_cast<float4*>(d.sums + at), float4{sum, exact, most, 0});
  }
}

// ---- The second launch ----

constexpr int kColumns = 32;  // of a block
constexpr int kPacks = kColumns / 4;
constexpr int kGroups = kThreads / kPacks;  // splits that are added at a time
static_assert(kMaxSplits <= kThreads && kMaxSplits % kGroups == 0, "a thread a split");

struct Combine {
  BlockPartials most, sum, exact;
  float weights[kMaxSplits];
  alignas(16) float o[kGroups][kColumns];
};

template <bool kOnline>
__global__ void __launch_bounds__(kThreads) combine_kernel(Decode d) {
  Combine& shared = static_shared<Combine>();
  const AttentionParams& p = d.p;
  const int splits = mutated(Mutation::split_left_out) ? d.splits - 1 : d.splits;
  const int thread = threadIdx.x, group = thread / kPacks, first = blockIdx.y * kColumns;
  const int sequence = blockIdx.x / d.rows, row = blockIdx.x % d.rows;
  const int64_t at = int64_t{sequence} * d.splits * d.rows + row;

  // All that is read, at once.
  float4 part[kMaxSplits / kGroups];
#pragma unroll
  for (int i = 0; i < kMaxSplits / kGroups; ++i) {
    const int split = i * kGroups + group;
    part[i] = split < splits
                  ? load(reinterpret_cast<const float4*>(d.o + (at + split * d.rows) * p.head_dim +
                                                         first + thread % kPacks * 4))
                  : float4{0, 0, 0, 0};
  }
  float4 sums = {0, 0, kOnline ? -INFINITY : 0.0f, 0};
  if (thread < splits) sums = load(reinterpret_cast<const float4*>(d.sums + at + thread * d.rows));

  float most = 0;
  if constexpr (kOnline) {
    most = max_block<kWarps>(sums.z, shared.most);
    float weight = exp2_approx(sums.z - (most == -INFINITY ? 0.0f : most));
    if (mutated(Mutation::splits_unweighted)) weight = 1;
    store(&shared.weights[thread], weight);
    sums.x *= weight;
    sums.y *= weight;
  }
  const float sum = sum_block<kWarps>(sums.x, shared.sum);
  const float exact = sum_block<kWarps>(sums.y, shared.exact);

  float4 o = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kMaxSplits / kGroups; ++i) {
    const float weight = kOnline ? load(&shared.weights[i * kGroups + group]) : 1.0f;
    o.x += part[i].x * weight;
    o.y += part[i].y * weight;
    o.z += part[i].z * weight;
    o.w += part[i].w * weight;
  }
  store(reinterpret_cast<float4*>(&shared.o[group][thread % kPacks * 4]), o);
  sync_block();

  const int64_t b = sequence / d.kv_heads, query = query_of(d, row);
  const int64_t head = head_of(d, sequence % d.kv_heads, row);
  if (thread < kColumns / 2) {
    float x = 0, y = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float2 pair = load(reinterpret_cast<const float2*>(&shared.o[g][thread * 2]));
      x += pair.x;
      y += pair.y;
    }
    const float scale = sum == 0 ? 0.0f : 1.0f / sum;
    store_pair(p, b, head, query, first + thread * 2, pack_pair(p.q_dtype, x * scale, y * scale));
  }
  if (thread == 0 && blockIdx.y == 0)
    store(&p.lse[(b * p.q_heads + head) * p.q_length + query], log_sum_exp(sum, exact, most));
}

// ---- Launches ----

template <typename T, int kDim, bool kOnline>
void run(Decode d, CudaCall& call) {
  using Tile = DecodeTile<kDim>;
  const AttentionParams& p = d.p;
  const int64_t sequences = p.batch * p.kv_heads, shared_bytes = sizeof(typename Tile::Shared);
  const int64_t keys = most_visible_keys(p.capacity, p.window, p.q_length);
  d.splits = static_cast<int>(
      decode_splits(sequences, keys, Tile::kKeys, resident_blocks(Tile::kBlocks, shared_bytes)));
  if (d.splits > 1) {
    const int64_t partials = sequences * d.splits * d.rows;
    void* scratch = call.allocate(call.owner, partials * (kDim * sizeof(float) + sizeof(Sums)));
    d.o = static_cast<float*>(scratch);
    d.sums = reinterpret_cast<Sums*>(d.o + partials * kDim);
  }
  launch(call, "decode split", split_kernel<T, kDim, kOnline>, dim3(sequences, d.splits), kThreads,
         shared_bytes, d);
  if (d.splits > 1)
    launch(call, "decode combine", combine_kernel<kOnline>,
           dim3(sequences * d.rows, kDim / kColumns), kThreads, 0, d);
}

template <typename T, bool kOnline>
void run(const Decode& d, CudaCall& call) {
  switch (d.p.head_dim) {
    case 64:
      return run<T, 64, kOnline>(d, call);
    case 128:
      return run<T, 128, kOnline>(d, call);
    case 256:
      return run<T, 256, kOnline>(d, call);
  }
}

}  // namespace

// Of what attention.cu has found fit for tensor cores. Keys are counted in 32 bits.
bool attention_decode_takes(const AttentionParams& p) {
  constexpr int64_t kMost = 1 << 30;
  return p.q_length * (p.q_heads / p.kv_heads) <= kRows && p.capacity <= kMost &&
         p.k_strides.s <= kMost && p.v_strides.s <= kMost;
}

void attention_decode(const AttentionParams& p, CudaCall& call) {
  const float softcap = mutated(Mutation::cap_dropped) ? 0.0f : p.softcap;
  const int group = static_cast<int>(p.q_heads / p.kv_heads);
  const Decode d = {
      .p = p,
      .scales = softmax_scales(p.scale, softcap),
      .kv_heads = static_cast<int>(p.kv_heads),
      .rows = static_cast<int>(p.q_length) * group,
      .group = group,
      .splits = 1,
      .inverse_group = (256 + group - 1) / group,
      .o = nullptr,
      .sums = nullptr,
  };
  if (d.rows == 0) return;
  if (p.q_dtype == DType::f16)
    run<f16_t, true>(d, call);
  else if (bounded_by(softcap))
    run<bf16_t, false>(d, call);
  else
    run<bf16_t, true>(d, call);
}

}  // namespace gemma2::cuda
