// attention for what the tensor-core kernels do not take: out = softmax(mask(cap tanh(scale q k /
// cap))) v and the log-sum-exp of the capped scores, in float32 whatever the dtypes.
//
// A block is 32 rows (row = query x head of one group, so that the group shares its keys) against
// tiles of 32 keys that start at multiples of 32 of the position; K and V take turns in one tile of
// shared memory, widened on the way in. A warp has 4 rows; a lane is a key in S = Q K and D / 32
// columns in O += P V, where p passes through shared memory of the warp's own. Rows keep a running
// maximum of tanh (or of the score, uncapped): p = exp(cap (t - m)), whose argument is rounded
// once, near 0.
//
// Planned: 256 threads, at most 128 registers, 69 KB of shared memory at D 256: two blocks on an SM
// that has 163 KB. Bound by FMA and shared memory alike: a lane's 16 products of S take 8
// wavefronts, which is twice the time of the products. dtypes are run-time values, since only the
// loads depend on them: 3 instantiations. Called by attention.cu.

#include <math.h>

#include "common/mutate.h"
#include "common/visibility.h"
#include "cuda/launch.h"
#include "cuda/pack.h"
#include "cuda/reduce.h"

namespace gemma2::cuda {

void attention_any(const AttentionParams& p, CudaCall& call);

namespace {

constexpr int kTile = kWarp;  // keys: a bit or a lane each
constexpr int kRows = kWarp;
constexpr int kWarps = 8;
constexpr int kWarpRows = kRows / kWarps;
constexpr int kThreads = kWarps * kWarp;

template <int kDim>
struct alignas(16) Layout {
  float q[kRows][kDim];
  float kv[kTile][kDim + 4];  // 8 lanes read 16 bytes of 8 rows: all banks
  float p[kWarps][kWarpRows][kTile];
};

// What the kernel needs beside the operator's arguments.
struct Plan {
  int64_t group, rows, blocks;  // query heads per key/value head; rows and blocks of one
  float to_exponent;            // from t to the score: the cap, or 1
  float scale;                  // from q k to t, or to tanh's argument
  bool capped, wide;            // wide: rows of K and V are aligned to 16 bytes
};

// Four neighbouring elements.
template <typename T>
GEMMA2_DEVICE float4 load_four(const T* p, bool wide) {
  if (!wide)
    return {to_float(load(p)), to_float(load(p + 1)), to_float(load(p + 2)), to_float(load(p + 3))};
  const auto v = load_pack<4>(p);
  return {element(v, 0), element(v, 1), element(v, 2), element(v, 3)};
}
GEMMA2_DEVICE float4 load_four(const void* p, int64_t at, DType dtype, bool wide) {
  if (dtype == DType::f32) return load_four(static_cast<const float*>(p) + at, wide);
  if (dtype == DType::bf16) return load_four(static_cast<const bf16_t*>(p) + at, wide);
  return load_four(static_cast<const f16_t*>(p) + at, wide);
}

GEMMA2_DEVICE void store_element(void* p, int64_t at, DType dtype, float v) {
  if (dtype == DType::f32)
    store(static_cast<float*>(p) + at, v);
  else if (dtype == DType::bf16)
    store(static_cast<bf16_t*>(p) + at, from_float<bf16_t>(v));
  else
    store(static_cast<f16_t*>(p) + at, from_float<f16_t>(v));
}

GEMMA2_DEVICE float dot(float4 sum) { return (sum.x + sum.y) + (sum.z + sum.w); }
GEMMA2_DEVICE void multiply_add(float4& sum, float4 a, float4 b) {
  sum.x = fmaf(a.x, b.x, sum.x);
  sum.y = fmaf(a.y, b.y, sum.y);
  sum.z = fmaf(a.z, b.z, sum.z);
  sum.w = fmaf(a.w, b.w, sum.w);
}

// Bits [lo - start, hi - start) of a tile.
GEMMA2_DEVICE uint32_t tile_bits(int64_t lo, int64_t hi, int64_t start) {
  const int begin = lo <= start ? 0 : lo - start >= kTile ? kTile : static_cast<int>(lo - start);
  const int end = hi <= start ? 0 : hi - start >= kTile ? kTile : static_cast<int>(hi - start);
  return begin >= end ? 0 : (kAllLanes >> (kTile - (end - begin))) << begin;
}

// Keys that someone sees, from x[b, h] on, as float32; zeros for the others. `slot` is that of the
// key start + lane.
template <int kDim>
GEMMA2_DEVICE void load_tile(Layout<kDim>& tile, const void* x, int64_t base, int64_t stride,
                             DType dtype, bool wide, uint32_t seen, int64_t slot) {
  constexpr int kChunks = kDim / 4, kKeys = kTile / kWarps;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int c = lane; c < kKeys * kChunks; c += kWarp) {
    const int key = warp * kKeys + c / kChunks, d = c % kChunks * 4;
    const int64_t at = base + shuffle(slot, key) * stride + d;
    const float4 v = seen >> key & 1 ? load_four(x, at, dtype, wide) : float4{0, 0, 0, 0};
    store(reinterpret_cast<float4*>(&tile.kv[key][d]), v);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) any_kernel(AttentionParams p, Plan plan) {
  // Columns of O by lane: kPer at lane * kPer, and so on kWarp * kPer further.
  constexpr int kPer = kDim == 64 ? 2 : 4, kPieces = kDim / kWarp / kPer;
  Layout<kDim>& tile = dynamic_shared<Layout<kDim>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  // Late queries first: under causality they have the most keys.
  const int64_t heads = p.kv_heads * p.batch;
  const int64_t b = blockIdx.x % heads / p.kv_heads, h = blockIdx.x % heads % p.kv_heads;
  const int64_t first = (plan.blocks - 1 - blockIdx.x / heads) * kRows;

  // What row first + lane sees.
  const int64_t kv_len = p.kv_len[b], k_base = p.k_base == nullptr ? 0 : p.k_base[b];
  int64_t lo = 0, hi = 0;
  if (first + lane < plan.rows) {
    const int64_t column = (first + lane) / plan.group;
    const int64_t kv_start = p.kv_start == nullptr ? 0 : p.kv_start[b * p.q_length + column];
    const KeyRange seen = visible_keys(p.q_start[b] + column, kv_len, kv_start, k_base, p.window);
    lo = max(seen.lo, kv_len - p.capacity);  // the buffer holds no others
    hi = seen.hi;
  }
  if (lo >= hi) lo = hi = 0;
  int64_t lo_all = lo < hi ? lo : INT64_MAX, hi_all = hi;
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    lo_all = min(lo_all, shuffle_xor(lo_all, bits));
    hi_all = max(hi_all, shuffle_xor(hi_all, bits));
  }

#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kDim / 4; i += kThreads) {
    const int r = i / (kDim / 4), d = i % (kDim / 4) * 4;
    const int64_t row = first + r;
    float4 q = {0, 0, 0, 0};
    if (row < plan.rows) {
      const int64_t head = query_head(h, row % plan.group, plan.group, p.kv_heads);
      q = load_four(p.q,
                    b * p.q_strides.b + head * p.q_strides.h + row / plan.group * p.q_strides.s + d,
                    p.q_dtype, false);
    }
    store(reinterpret_cast<float4*>(&tile.q[r][d]), q);
  }

  const int64_t k_at = b * p.k_strides.b + h * p.k_strides.h;
  const int64_t v_at = b * p.v_strides.b + h * p.v_strides.h;
  float o[kWarpRows][kPieces][kPer] = {};
  // l is this lane's share of the sum: of the keys start + lane.
  float m[kWarpRows], l[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    m[r] = -INFINITY;
    l[r] = 0;
  }

  for (int64_t start = hi_all == 0 ? 0 : lo_all / kTile * kTile; start < hi_all; start += kTile) {
    const uint32_t mine = tile_bits(lo, hi, start);
    uint32_t seen = mine;
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) seen |= shuffle_xor(seen, bits);
    if (seen == 0) continue;  // the same in all warps
    const int64_t slot = seen >> lane & 1 ? read_slot(start + lane, k_base, p.capacity) : 0;

    sync_block();  // the tile before has been used
    load_tile(tile, p.k, k_at, p.k_strides.s, p.kv_dtype, plan.wide, seen, slot);
    sync_block();

    float4 sum[kWarpRows] = {};
#pragma unroll 4
    for (int d = 0; d < kDim; d += 4) {
      const float4 k = load(reinterpret_cast<const float4*>(&tile.kv[lane][d]));
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r)
        multiply_add(sum[r],
                     load(reinterpret_cast<const float4*>(&tile.q[warp * kWarpRows + r][d])), k);
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const bool visible = shuffle(mine, warp * kWarpRows + r) >> lane & 1;
      float t = dot(sum[r]) * plan.scale;
      if (plan.capped) t = tanhf(t);
      const float m_new = fmaxf(m[r], max_warp(visible ? t : -INFINITY));
      // Both are -inf where the row has seen nothing yet.
      const float shrink = m[r] == m_new ? 1.0f : expf(plan.to_exponent * (m[r] - m_new));
      const float weight = visible ? expf(plan.to_exponent * (t - m_new)) : 0.0f;
      m[r] = m_new;
      l[r] = l[r] * shrink + weight;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int e = 0; e < kPer; ++e) o[r][i][e] *= shrink;
      store(&tile.p[warp][r][lane], weight);
    }

    sync_block();  // K has been used
    load_tile(tile, p.v, v_at, p.v_strides.s, p.kv_dtype, plan.wide, seen, slot);
    sync_block();

#pragma unroll 2
    for (int key = 0; key < kTile; key += 4) {
      float4 weights[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r)
        weights[r] = load(reinterpret_cast<const float4*>(&tile.p[warp][r][key]));
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        // Four keys alone first: a sum over many keys is a quarter as long, and its error half.
        float four[kWarpRows][kPer] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto v = load_pack<kPer>(&tile.kv[key + j][(i * kWarp + lane) * kPer]);
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            const float w = j == 0   ? weights[r].x
                            : j == 1 ? weights[r].y
                            : j == 2 ? weights[r].z
                                     : weights[r].w;
#pragma unroll
            for (int e = 0; e < kPer; ++e) four[r][e] = fmaf(w, element(v, e), four[r][e]);
          }
        }
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
          for (int e = 0; e < kPer; ++e) o[r][i][e] += four[r][e];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const float total = sum_warp(l[r]);
    const int64_t row = first + warp * kWarpRows + r;
    if (row >= plan.rows) continue;
    const int64_t head = query_head(h, row % plan.group, plan.group, p.kv_heads);
    const int64_t column = row / plan.group;
    const bool empty = total == 0;  // NaN is not empty
    const int64_t at = b * p.out_strides.b + head * p.out_strides.h + column * p.out_strides.s;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < kPer; ++e)
        store_element(p.out, at + (i * kWarp + lane) * kPer + e, p.q_dtype,
                      empty ? 0.0f : o[r][i][e] / total);
    if (lane == 0) {
      const float most = mutated(Mutation::lse_without_maximum) ? 0.0f : m[r];
      store(p.lse + (b * p.q_heads + head) * p.q_length + column,
            empty ? -INFINITY : fmaf(plan.to_exponent, most, logf(total)));
    }
  }
}

template <int kDim>
void run(const AttentionParams& p, const Plan& plan, CudaCall& call) {
  launch(call, "attention_any", any_kernel<kDim>, plan.blocks * p.kv_heads * p.batch, kThreads,
         sizeof(Layout<kDim>), p, plan);
}

bool aligned(const void* x, const Strides3& strides, DType dtype) {
  bool yes = true;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t stride : {strides.b, strides.h, strides.s})
      yes = yes && rows_of_16_bytes<T>(x, stride);
  });
  return yes;
}

}  // namespace

void attention_any(const AttentionParams& p, CudaCall& call) {
  const float softcap = mutated(Mutation::cap_dropped) ? 0.0f : p.softcap;
  Plan plan;
  plan.group = p.q_heads / p.kv_heads;
  plan.rows = p.q_length * plan.group;
  plan.blocks = ceil_div(plan.rows, kRows);
  plan.capped = softcap > 0;
  plan.to_exponent = plan.capped ? softcap : 1.0f;
  plan.scale = plan.capped ? p.scale / softcap : p.scale;
  plan.wide = aligned(p.k, p.k_strides, p.kv_dtype) && aligned(p.v, p.v_strides, p.kv_dtype);
  switch (p.head_dim) {
    case 64:
      return run<64>(p, plan, call);
    case 128:
      return run<128>(p, plan, call);
    case 256:
      return run<256>(p, plan, call);
  }
}

}  // namespace gemma2::cuda
