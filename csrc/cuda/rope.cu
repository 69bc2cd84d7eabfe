// rope: rotates the halves of every head of q and k, in float32, rounded once:
//   (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
// rope_cache: the same, with k rotated straight into its cache slot (rounded once, to the cache's
// dtype) and v copied beside it: q, k and v are read once, and no rotated copy of k exists.
//
// The heads of q, k and v of a token are one list. A thread takes a pack of 16 bytes (of the wider
// of the two types) at the same place in both halves of one to four heads (cache_rows.h), with its
// angles in registers; two heads at a time, so four packs are in flight beside the angles. Element
// by element where rows are not aligned. In decode every head has threads of its own, and q, k, v
// and the positions are all under way before the slot is known: one latency, not two.
//
// Planned: 80 registers, 24 warps on sm_80 and sm_90, 48 KB in flight. Bound by memory: every byte
// of q, k and v moved once (of pads, which are not written, read); a row of angles comes from
// memory once for all heads of its token, whose threads share a block, and from the first-level
// cache once for four heads in prefill, for one or two in decode; 3 FLOP an element. In decode
// bound by latency.
//
// One kernel for both: with a cache of k's own dtype the same code gives the same bits. Called by
// csrc/bindings/rope.cpp.

#include "common/rope.h"

#include "cuda/cache_rows.h"

namespace gemma2::cuda {
namespace {

constexpr int kHeads = 2;  // in flight

template <int kCount>
struct Angles {
  float cos[kCount], sin[kCount];
};
template <int kCount>
GEMMA2_DEVICE Angles<kCount> load_angles(const float* cos, const float* sin) {
  constexpr int kPart = kCount < 4 ? kCount : 4;
  Angles<kCount> a;
#pragma unroll
  for (int first = 0; first < kCount; first += kPart) {
    const auto c = load_pack<kPart>(cos + first), s = load_pack<kPart>(sin + first);
#pragma unroll
    for (int e = 0; e < kPart; ++e) {
      a.cos[first + e] = element(c, e);
      a.sin[first + e] = element(s, e);
    }
  }
  return a;
}

template <typename Out, typename T, int kCount>
GEMMA2_DEVICE void write_rotated(Out* to, int64_t half, const Pack<T, kCount>& x1,
                                 const Pack<T, kCount>& x2, const Angles<kCount>& a) {
  float y1[kCount], y2[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    rotate_pair(element(x1, e), element(x2, e), a.cos[e], a.sin[e], y1[e], y2[e]);
  store_pack(to, pack_of<Out>(y1));
  store_pack(to + half, pack_of<Out>(y2));
}

// Keys go to `c`: with c.q_start to their slots and the values beside them, without to slot s, and
// there are no values.
template <typename T, typename Cache, int kCount>
__global__ void __launch_bounds__(kHeadThreads, 3)
    rope_kernel(RopeParams p, CacheWriteParams c, uint32_t blocks_a_row) {
  const auto [b, s, i] = head_place(blocks_a_row, kCount);
  const int64_t half = p.head_dim / 2;
  if (s >= p.length || i >= half) return;
  const int64_t keys = p.q_heads, values = keys + p.kv_heads;  // where they begin in the list
  const int64_t heads = c.q_start == nullptr ? values : values + p.kv_heads;
  const int64_t angles_at = b * p.table_batch_stride + s * half + i;
  const Angles<kCount> angles = load_angles<kCount>(p.cos + angles_at, p.sin + angles_at);
  for (int64_t first = threadIdx.y; first < heads; first += blockDim.y * kHeads) {
    Pack<T, kCount> x1[kHeads], x2[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int64_t h = first + j * blockDim.y;
      if (h >= heads) break;
      const void* of = h < keys ? p.q : h < values ? p.k : c.v;
      const Strides3& strides = h < keys ? p.q_strides : h < values ? p.k_strides : c.v_strides;
      const int64_t head = h < keys ? h : h < values ? h - keys : h - values;
      const T* x = static_cast<const T*>(of) + b * strides.b + head * strides.h + s * strides.s + i;
      x1[j] = load_pack_once<kCount>(x);
      x2[j] = load_pack_once<kCount>(x + half);
    }
    const int64_t slot = c.q_start == nullptr ? s : slot_of_column(c, b, s);
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int64_t h = first + j * blockDim.y;
      if (h >= heads) break;
      if (h < keys) {
        T* q = static_cast<T*>(p.q_out) + b * p.q_out_strides.b + h * p.q_out_strides.h +
               s * p.q_out_strides.s + i;
        write_rotated(q, half, x1[j], x2[j], angles);
      } else if (slot < 0) {
        continue;
      } else if (h < values) {
        Cache* k = static_cast<Cache*>(c.k_cache) + b * c.k_cache_strides.b +
                   (h - keys) * c.k_cache_strides.h + slot * c.k_cache_strides.s + i;
        write_rotated(k, half, x1[j], x2[j], angles);
      } else {
        Cache* v = static_cast<Cache*>(c.v_cache) + b * c.v_cache_strides.b +
                   (h - values) * c.v_cache_strides.h + slot * c.v_cache_strides.s + i;
        write_pack(v, x1[j]);
        write_pack(v + half, x2[j]);
      }
    }
  }
}

template <typename T, typename Cache, int kCount>
void run(const char* name, const RopeParams& p, const CacheWriteParams& c, int64_t heads,
         CudaCall& call) {
  const HeadGrid shape = head_grid(ceil_div(p.head_dim / 2, kCount), heads, p.batch, p.length);
  launch(call, name, rope_kernel<T, Cache, kCount>, shape.grid, shape.block, 0, p, c,
         shape.blocks_a_row);
}

template <typename T, typename Cache>
void run(const char* name, const RopeParams& p, const CacheWriteParams& c, int64_t heads,
         bool aligned, CudaCall& call) {
  constexpr int kCount = pack_count<T, Cache>();
  aligned = aligned && p.head_dim / 2 % kCount == 0 &&
            rows_of_16_bytes<float>(p.cos, p.table_batch_stride) &&
            rows_of_16_bytes<float>(p.sin, p.table_batch_stride) &&
            heads_of_16_bytes<T>(p.q, p.q_strides) && heads_of_16_bytes<T>(p.k, p.k_strides) &&
            heads_of_16_bytes<T>(p.q_out, p.q_out_strides) &&
            heads_of_16_bytes<Cache>(c.k_cache, c.k_cache_strides);
  if (aligned)
    run<T, Cache, kCount>(name, p, c, heads, call);
  else
    run<T, Cache, 1>(name, p, c, heads, call);
}

}  // namespace

void rope(const RopeParams& p, CudaCall& call) {
  CacheWriteParams c = {};
  c.k_cache = p.k_out;
  c.k_cache_strides = p.k_out_strides;
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    run<T, T>("rope", p, c, p.q_heads + p.kv_heads, true, call);
  });
}

void rope_cache(const RopeParams& p, const CacheWriteParams& c, CudaCall& call) {
  dispatch(p.dtype, [&](auto t) {
    dispatch(c.cache_dtype, [&](auto cache) {
      using T = typename decltype(t)::type;
      using Cache = typename decltype(cache)::type;
      const bool aligned = heads_of_16_bytes<T>(c.v, c.v_strides) &&
                           heads_of_16_bytes<Cache>(c.v_cache, c.v_cache_strides);
      run<T, Cache>("rope_cache", p, c, p.q_heads + 2 * p.kv_heads, aligned, call);
    });
  });
}

}  // namespace gemma2::cuda
