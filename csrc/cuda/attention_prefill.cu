// attention, prefill: out = softmax(mask(cap tanh(scale q k / cap))) v and the log-sum-exp of the
// capped scores, for 16-bit q, k and v of one dtype, on tensor cores.
//
// A block is 64 rows (row = query x head of one group, so that the group shares its keys) against
// tiles of 64 keys that start at multiples of 64 of the position. Its 4 warps have 16 rows each: S
// = Q K in registers, p = exp(cap tanh(.)) from there to operands without leaving them, O += P V.
// K and V have a tile of shared memory each and take turns: while one is multiplied, the other's
// next tile is on its way. Tiles outside the block's union of visible_keys() are never read; a warp
// skips what its own rows do not see, in steps of 16 keys, and evaluates the mask only where some
// of them see a key and others do not. Blocks of late queries first: under causality they are the
// longest.
//
// A deterministic call closes its sums where the position is a multiple of kSumKeys
// (attention_sums.h): a block makes them in turn and keeps a total in global memory, or, where too
// few blocks would run, there is a block for each and attention_merge.cu merges them. A row's bits
// are the same.
//
// Planned, for 128 threads:
//   head_dim   shared memory   registers a thread   blocks on an SM of 100, 164, 228 KB
//   64         25 KB           168                  3, 3, 3
//   128        49 KB           255                  2, 2, 2
//   256        97 KB           255                  1, 1, 2
// At 256, O takes half of the registers and S an eighth; Q stays in shared memory, where it costs
// one ldmatrix beside 4 of K. What is only needed between the products lies in shared memory, too.
// A second pair of tiles would take 160 KB: no GPU with 100 KB could run it. At 128, three blocks
// (168 registers) spilled, and with two there is room for the fragments of Q.
//
// Bound by the tensor cores and, as much, by shared memory: with 16 rows a warp, an ldmatrix of 512
// bytes serves two products. Per tile, head_dim / 16 x 8 products for S and as many for O, and
// three special functions a score (attention_softmax.h). Called by attention.cu.

#include <type_traits>

#include "common/attention_plan.h"
#include "common/mutate.h"
#include "common/visibility.h"
#include "cuda/attention_softmax.h"
#include "cuda/attention_sums.h"
#include "cuda/attention_tile.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace gemma2::cuda {

void attention_prefill(const AttentionParams& p, CudaCall& call);

namespace {

constexpr int kWarps = 4;
constexpr int kWarpRows = 16;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kKeys = 64;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocks = kKeys / 8;  // of keys, in the fragments of S
constexpr int kSteps = kKeys / 16;  // of keys, in the products with V

// The keys that some row of the block sees, counted from the start of the block's first tile.
struct alignas(16) Span {
  int begin, end;
  uint32_t slot;  // of the first of them
  int phase;      // keys from the last multiple of kSumKeys to the block's first tile
};

// What a warp needs between the products. Here and not in registers, where there is no room.
struct Kept {
  Span span;
  const void *k, *v;  // of the block's head
};

template <int kDim>
struct alignas(128) Layout {
  unsigned char q[kRows * TileRows<kDim>::kBytes];  // and in the end the result
  unsigned char k[kKeys * TileRows<kDim>::kBytes];
  unsigned char v[kKeys * TileRows<kDim>::kBytes];
  int lo[kRows], hi[kRows];  // the keys that each row sees, counted as Span does
  Kept kept[kWarps];
};

// Where sums are closed: at the end of a row's keys, or each kSumKeys, by one block after the other
// or by a block for each.
enum class Closing { once, in_turn, side_by_side };

// What the kernel needs beside the operator's arguments.
struct Plan {
  int group, rows, blocks;  // query heads per key/value head; rows and blocks of one
  SoftmaxScales scales;
  Closing closing;
  int64_t first_block;  // of the launch
  float4* totals;       // in turn: of each block and thread
  Parts parts;          // side by side
};

// This thread's total in working memory: pieces kThreads apart.
template <int kDim>
GEMMA2_DEVICE float4* total_of(float4* totals) {
  return totals + int64_t{blockIdx.x} * kTotals<kDim> * kThreads + threadIdx.x;
}

// Blocks that should fit on an SM.
constexpr int resident(int dim) { return dim == 64 ? 3 : 2; }

// Working memory that a launch takes at most: more blocks have totals of their own in further ones.
constexpr int64_t kWorkingBytes = 128 << 20;

// ---- Who sees what ----

GEMMA2_DEVICE KeyRange keys_of_row(const AttentionParams& p, const Plan& plan, int64_t b, int row) {
  if (row >= plan.rows) return {0, 0};
  const int column = row / plan.group;
  const int64_t kv_len = p.kv_len[b];
  const int64_t kv_start = p.kv_start == nullptr ? 0 : p.kv_start[b * p.q_length + column];
  const int64_t k_base = p.k_base == nullptr ? 0 : p.k_base[b];
  KeyRange seen = visible_keys(p.q_start[b] + column, kv_len, kv_start, k_base, p.window);
  seen.lo = max(seen.lo, kv_len - p.capacity);  // the buffer holds no others
  return seen.lo < seen.hi ? seen : KeyRange{0, 0};
}

// Finds the block's span, and writes what this warp's rows see.
template <int kDim>
GEMMA2_DEVICE Span find_span(Layout<kDim>& tile, const AttentionParams& p, const Plan& plan,
                             int64_t b, int first) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Every warp looks at all rows of the block, a lane at two, and writes its own.
  KeyRange rows[2];
  int64_t lo = INT64_MAX, hi = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i] = keys_of_row(p, plan, b, first + i * kWarp + lane);
    if (rows[i].lo >= rows[i].hi) continue;
    lo = min(lo, rows[i].lo);
    hi = max(hi, rows[i].hi);
  }
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    lo = min(lo, shuffle_xor(lo, bits));
    hi = max(hi, shuffle_xor(hi, bits));
  }
  if (lo >= hi) return {0, 0, 0, 0};
  const int64_t origin = lo / kKeys * kKeys;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = i * kWarp + lane;
    if (row / kWarpRows != warp) continue;
    const bool empty = rows[i].lo >= rows[i].hi;
    store(&tile.lo[row], empty ? 0 : static_cast<int>(rows[i].lo - origin));
    store(&tile.hi[row], empty ? 0 : static_cast<int>(rows[i].hi - origin));
  }
  return {static_cast<int>(lo - origin), static_cast<int>(hi - origin),
          static_cast<uint32_t>(read_slot(lo, p.k_base == nullptr ? 0 : p.k_base[b], p.capacity)),
          static_cast<int>(origin % kSumKeys)};
}

// What this thread's two rows see of the tile of keys from `start` on.
template <int kDim>
GEMMA2_DEVICE SeenKeys seen_keys(const Layout<kDim>& tile, int start) {
  SeenKeys seen;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x / kWarp * kWarpRows + threadIdx.x % kWarp / 4 + 8 * i;
    seen.begin[i] = max(load(&tile.lo[row]) - start, 0);
    seen.end[i] = min(load(&tile.hi[row]) - start, kKeys);
  }
  return seen;
}

// The blocks of 16 keys of a tile that a warp multiplies: [begin, end); full: every row sees all.
struct Steps {
  int begin, end;
  bool full;
};
GEMMA2_DEVICE Steps find_steps(const SeenKeys& seen) {
  if (all(seen.begin[0] == 0 && seen.begin[1] == 0 && seen.end[0] == kKeys && seen.end[1] == kKeys))
    return {0, kSteps, true};
  int begin = kKeys, end = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (seen.begin[i] < seen.end[i]) {
      begin = min(begin, seen.begin[i]);
      end = max(end, seen.end[i]);
    }
#pragma unroll
  for (int bits = 4; bits < kWarp; bits *= 2) {  // the four lanes of a row agree
    begin = min(begin, shuffle_xor(begin, bits));
    end = max(end, shuffle_xor(end, bits));
  }
  return {begin / 16, (end + 15) / 16, false};
}

// The keys of the tile from `start` on that some row of the block sees, a bit each. They are all of
// the span's unless documents leave gaps.
template <int kDim>
GEMMA2_DEVICE uint64_t seen_by_some(const Layout<kDim>& tile, int start) {
  uint64_t seen = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = i * kWarp + threadIdx.x % kWarp;
    const int begin = max(load(&tile.lo[row]) - start, 0);
    const int end = min(load(&tile.hi[row]) - start, kKeys);
    if (begin < end) seen |= ~uint64_t{0} >> (kKeys - (end - begin)) << begin;
  }
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) seen |= shuffle_xor(seen, bits);
  return seen;
}

// ---- Copies ----

// Starts copying the tile of keys from `start` on; keys that nobody sees become zeros.
template <typename T, int kDim>
GEMMA2_DEVICE void copy_tile(unsigned char* to, const void* x, int64_t stride, int start,
                             const Span& span, const AttentionParams& p, const Layout<kDim>& tile) {
  constexpr int kChunks = TileRows<kDim>::kChunks, kAtOnce = kThreads / kChunks;
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const T* from = static_cast<const T*>(x) + chunk * 8;
  const uint32_t capacity = static_cast<uint32_t>(p.capacity);
  // The span has at most `capacity` keys, so a ring wraps once.
  const uint32_t first = span.slot + static_cast<uint32_t>(start - span.begin);
  const bool wraps = first < capacity && first + kKeys > capacity;
  // Nearly all tiles: a pointer and a constant step. row + i is row ^ i, so tile_offset() of it is
  // a constant beyond one of two.
  if (start >= span.begin && start + kKeys <= span.end && !wraps && p.kv_start == nullptr) {
    from += ((first < capacity ? first : first - capacity) + row) * stride;
#pragma unroll
    for (int i = 0; i < kKeys; i += kAtOnce, from += kAtOnce * stride)
      copy_async<16>(to + i * TileRows<kDim>::kBytes + tile_offset<kDim>(row, chunk ^ (i & 7)),
                     from);
    return;
  }
  const uint64_t some = p.kv_start == nullptr ? ~uint64_t{0} : seen_by_some(tile, start);
#pragma unroll 1  // or it spills on sm_100
  for (int i = 0; i < kKeys; i += kAtOnce) {
    const int key = row + i, nth = start + key - span.begin;  // of the tile's and the span's keys
    const bool valid = nth >= 0 && start + key < span.end && (some >> key & 1);
    uint32_t slot = span.slot + static_cast<uint32_t>(nth);
    if (slot >= capacity) slot -= capacity;
    copy_async<16>(to + tile_offset<kDim>(key, chunk), from + (valid ? slot : 0) * stride, valid);
  }
}

// Where row `row` of the key/value head lies in q, out and lse.
struct RowPlace {
  int64_t head, column;
};
GEMMA2_DEVICE RowPlace place_of(const AttentionParams& p, const Plan& plan, int64_t h, int row) {
  return {query_head(h, row % plan.group, plan.group, p.kv_heads), row / plan.group};
}

// Starts copying the warp's own rows of Q.
template <typename T, int kDim>
GEMMA2_DEVICE void copy_queries(unsigned char* tile, const AttentionParams& p, const Plan& plan,
                                int64_t b, int64_t h, int first) {
  constexpr int kChunks = TileRows<kDim>::kChunks;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T* q = static_cast<const T*>(p.q) + b * p.q_strides.b;
#pragma unroll 4
  for (int c = lane; c < kWarpRows * kChunks; c += kWarp) {
    const int row = warp * kWarpRows + c / kChunks, chunk = c % kChunks;
    const bool valid = first + row < plan.rows;
    const RowPlace at = place_of(p, plan, h, valid ? first + row : 0);
    copy_async<16>(tile + tile_offset<kDim>(row, chunk),
                   q + at.head * p.q_strides.h + at.column * p.q_strides.s + chunk * 8, valid);
  }
}

// ---- Products ----

// Fragments of Q, kept in registers where there is room.
template <int kDim>
struct Queries {
  static constexpr bool kKept = kDim <= 128;
  uint32_t a[kKept ? kDim / 16 : 1][4];
};

// S of the blocks of 16 keys [begin, end) of the tile.
template <typename T, int kDim, bool kMasked>
GEMMA2_DEVICE void multiply_keys(float (&s)[kBlocks][4], const Queries<kDim>& queries,
                                 const Layout<kDim>& tile, int begin, int end) {
  const int row = threadIdx.x / kWarp * kWarpRows;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[block][e] = 0;
  // Four steps reach every bank: more, unrolled, would only be more addresses.
  [[maybe_unused]] constexpr int kUnroll = Queries<kDim>::kKept ? kDim / 16 : 4;
#pragma unroll kUnroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t a[4];
    if constexpr (Queries<kDim>::kKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = queries.a[d][i];
    } else {
      load_rows<kDim>(a, tile.q, row, d);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (kMasked && (step < begin || step >= end)) continue;
      uint32_t b[2][2];
      load_keys<kDim>(b[0], b[1], tile.k, step * 16, d);
      mma_16x8x16<T>(s[2 * step], a, b[0]);
      mma_16x8x16<T>(s[2 * step + 1], a, b[1]);
    }
  }
}

template <typename T, int kDim, bool kMasked>
GEMMA2_DEVICE void multiply_values(float (&o)[kDim / 8][4], const uint32_t (&p)[kSteps][4],
                                   const Layout<kDim>& tile, int begin, int end) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (kMasked && (step < begin || step >= end)) continue;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t b[2][2];
      load_values<kDim>(b[0], b[1], tile.v, step * 16, d);
      mma_16x8x16<T>(o[2 * d], p[step], b[0]);
      mma_16x8x16<T>(o[2 * d + 1], p[step], b[1]);
    }
  }
}

// ---- The kernel ----

template <typename T, int kDim, bool kOnline>
__global__ void __launch_bounds__(kThreads, resident(kDim))
    prefill_kernel(AttentionParams p, Plan plan) {
  Layout<kDim>& tile = dynamic_shared<Layout<kDim>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t heads = p.kv_heads * p.batch;
  const int64_t block = plan.first_block + blockIdx.x;
  const int b = static_cast<int>(block % heads / p.kv_heads);
  const int h = static_cast<int>(block % heads % p.kv_heads);
  const int first = (plan.blocks - 1 - static_cast<int>(block / heads)) * kRows;
  int begin = 0, end = 0;
  {
    const Span span = find_span(tile, p, plan, b, first);
    const T* k = static_cast<const T*>(p.k) + b * p.k_strides.b + h * p.k_strides.h;
    const T* v = static_cast<const T*>(p.v) + b * p.v_strides.b + h * p.v_strides.h;
    end = span.end;
    if (plan.closing == Closing::side_by_side) {
      begin = max(static_cast<int>(blockIdx.y) * kSumKeys - span.phase, 0);
      end = min(end, static_cast<int>(blockIdx.y + 1) * kSumKeys - span.phase);
    }
    sync_block();  // everyone knows what the rows see
    if (begin < end) {
      copy_queries<T, kDim>(tile.q, p, plan, b, h, first);
      copy_tile<T, kDim>(tile.k, k, p.k_strides.s, begin, span, p, tile);
      copy_async_commit();
      copy_tile<T, kDim>(tile.v, v, p.v_strides.s, begin, span, p, tile);
      copy_async_commit();
    }
    if (lane == 0) {
      store(&tile.kept[warp].span, span);
      store(&tile.kept[warp].k, static_cast<const void*>(k));
      store(&tile.kept[warp].v, static_cast<const void*>(v));
    }
  }

  float o[kDim / 8][4] = {};
  SoftmaxState state = softmax_start();
  Queries<kDim> queries;
  for (int start = begin; start < end; start += kKeys) {
    const bool more = start + kKeys < end;
    copy_async_wait<1>();
    sync_block();  // K is there
    const Steps steps = find_steps(seen_keys(tile, start));
    float s[kBlocks][4];
    uint32_t weights[kSteps][4];
    float shrink[2] = {1, 1};
    if constexpr (Queries<kDim>::kKept) {
      if (start == begin)
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d)
          load_rows<kDim>(queries.a[d], tile.q, warp * kWarpRows, d);
    }
    if (steps.full)
      multiply_keys<T, kDim, false>(s, queries, tile, 0, kSteps);
    else if (steps.begin < steps.end)
      multiply_keys<T, kDim, true>(s, queries, tile, steps.begin, steps.end);
    sync_block();  // K has been used
    if (more)
      copy_tile<T, kDim>(tile.k, load(&tile.kept[warp].k), p.k_strides.s, start + kKeys,
                         load(&tile.kept[warp].span), p, tile);
    copy_async_commit();

    const SeenKeys seen = seen_keys(tile, start);
    if (steps.full)
      probabilities<T, kOnline, false>(s, weights, state, plan.scales, seen, shrink);
    else if (steps.begin < steps.end)
      probabilities<T, kOnline, true>(s, weights, state, plan.scales, seen, shrink);
    if constexpr (kOnline) {
      if (any(shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[d][e] *= shrink[e / 2];
      }
    }

    copy_async_wait<1>();
    sync_block();  // V is there
    if (steps.full)
      multiply_values<T, kDim, false>(o, weights, tile, 0, kSteps);
    else if (steps.begin < steps.end)
      multiply_values<T, kDim, true>(o, weights, tile, steps.begin, steps.end);
    sync_block();  // V has been used
    if (more)
      copy_tile<T, kDim>(tile.v, load(&tile.kept[warp].v), p.v_strides.s, start + kKeys,
                         load(&tile.kept[warp].span), p, tile);
    copy_async_commit();

    if (plan.totals != nullptr) {
      const int keys = load(&tile.kept[warp].span).phase + start + kKeys;
      if (!more || keys % kSumKeys == 0)
        close_sums<kThreads, kOnline>(o, state, total_of<kDim>(plan.totals), keys <= kSumKeys);
    }
  }
  if (plan.totals == nullptr)
    finish(state);
  else if (end > 0)
    load_total<kThreads>(o, state, total_of<kDim>(plan.totals));
  if (plan.closing == Closing::side_by_side) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + warp * kWarpRows + lane / 4 + 8 * i;
      const int64_t sequence = int64_t{b} * p.kv_heads + h;
      if (row < plan.rows)
        store_part<kOnline>(o, state, i, plan.parts, sequence * plan.rows + row, blockIdx.y);
    }
    return;
  }

  // The result by way of the warp's own rows of Q, so that it is stored 16 bytes at a time.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_tile = warp * kWarpRows + lane / 4 + 8 * i, row = first + in_tile;
    const bool empty = state.l[i] == 0;  // NaN is not empty
    const float inverse = empty ? 0.0f : 1.0f / state.l[i];
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      store(reinterpret_cast<uint32_t*>(tile.q + tile_offset<kDim>(in_tile, d)) + lane % 4,
            pack2<T>(o[d][2 * i] * inverse, o[d][2 * i + 1] * inverse));
    if (lane % 4 == 0 && row < plan.rows) {
      const RowPlace at = place_of(p, plan, h, row);
      const float lse = log_sum_exp(state.l[i], state.exact[i], kOnline ? state.m[i] : 0.0f);
      store(p.lse + (b * p.q_heads + at.head) * p.q_length + at.column, empty ? -INFINITY : lse);
    }
  }
  sync_warp();
  constexpr int kChunks = TileRows<kDim>::kChunks;
  T* out = static_cast<T*>(p.out) + b * p.out_strides.b;
#pragma unroll 4
  for (int c = lane; c < kWarpRows * kChunks; c += kWarp) {
    const int in_tile = warp * kWarpRows + c / kChunks, chunk = c % kChunks, row = first + in_tile;
    if (row >= plan.rows) continue;
    const RowPlace at = place_of(p, plan, h, row);
    store(reinterpret_cast<uint4*>(out + at.head * p.out_strides.h + at.column * p.out_strides.s +
                                   chunk * 8),
          load(reinterpret_cast<const uint4*>(tile.q + tile_offset<kDim>(in_tile, chunk))));
  }
}

template <typename T, int kDim, bool kOnline>
void run(const AttentionParams& p, Plan plan, CudaCall& call) {
  const auto launch_blocks = [&](int64_t first, int64_t blocks, int64_t parts) {
    plan.first_block = first;
    launch(call, "attention_prefill", prefill_kernel<T, kDim, kOnline>, dim3(blocks, parts),
           kThreads, sizeof(Layout<kDim>), p, plan);
  };
  const int64_t sequences = p.kv_heads * p.batch, blocks = plan.blocks * sequences;
  if (!p.deterministic) return launch_blocks(0, blocks, 1);

  // Of the queries of a block.
  const int64_t queries = ceil_div(kRows - 1, plan.group) + 1;
  const int64_t keys =
      most_visible_keys(p.capacity, p.window, p.q_length < queries ? p.q_length : queries);
  const int64_t rows = plan.rows < kRows ? plan.rows : kRows;
  const int64_t parts =
      sums_side_by_side(blocks, rows, keys, resident_blocks(resident(kDim), sizeof(Layout<kDim>)));
  const int64_t part_bytes = sequences * plan.rows * parts * (kDim * sizeof(float) + sizeof(Sums));
  if (parts > 1 && part_bytes <= kWorkingBytes) {
    plan.closing = Closing::side_by_side;
    plan.parts.o = static_cast<float*>(allocate(call, part_bytes));
    plan.parts.sums = reinterpret_cast<Sums*>(plan.parts.o + sequences * plan.rows * parts * kDim);
    plan.parts.parts = static_cast<int>(parts);
    launch_blocks(0, blocks, parts);
    return attention_merge(p, plan.parts, call);
  }
  plan.closing = Closing::in_turn;
  const int64_t bytes = kTotals<kDim> * kThreads * sizeof(float4), most = kWorkingBytes / bytes;
  const int64_t at_once = blocks < most ? blocks : most;
  plan.totals = static_cast<float4*>(allocate(call, at_once * bytes));
  for (int64_t first = 0; first < blocks; first += at_once)
    launch_blocks(first, blocks - first < at_once ? blocks - first : at_once, 1);
}

template <typename T, int kDim>
void run(const AttentionParams& p, float softcap, const Plan& plan, CudaCall& call) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    if (bounded_by(softcap)) return run<T, kDim, false>(p, plan, call);
  }
  run<T, kDim, true>(p, plan, call);
}

template <typename T>
void run(const AttentionParams& p, float softcap, const Plan& plan, CudaCall& call) {
  switch (p.head_dim) {
    case 64:
      return run<T, 64>(p, softcap, plan, call);
    case 128:
      return run<T, 128>(p, softcap, plan, call);
    case 256:
      return run<T, 256>(p, softcap, plan, call);
  }
}

}  // namespace

void attention_prefill(const AttentionParams& p, CudaCall& call) {
  const float softcap = mutated(Mutation::cap_dropped) ? 0.0f : p.softcap;
  Plan plan = {};
  plan.group = static_cast<int>(p.q_heads / p.kv_heads);
  plan.rows = static_cast<int>(p.q_length) * plan.group;
  plan.blocks = static_cast<int>(ceil_div(plan.rows, kRows));
  plan.scales = softmax_scales(p.scale, softcap);
  if (p.q_dtype == DType::bf16)
    run<bf16_t>(p, softcap, plan, call);
  else
    run<f16_t>(p, softcap, plan, call);
}

}  // namespace gemma2::cuda
