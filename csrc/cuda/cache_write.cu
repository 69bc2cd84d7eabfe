// cache_write: k and v of a call into their slots (p - k_base) mod C; pads and what the ring has
// already lost are left out (common/cache_slots.h).
//
// A thread takes a pack of 16 bytes (of the wider of the two types) of k and of v in one to four
// heads of a token (cache_rows.h), two heads at a time, so four packs are in flight; element by
// element where rows are not aligned. A token that is not written costs its 24 bytes of positions.
// Planned: 64 registers, 32 warps on sm_80 and sm_90, 64 KB in flight. Bound by memory: every byte
// moved once. Called by csrc/bindings/cache_write.cpp.

#include "cuda/cache_rows.h"

namespace gemma2::cuda {
namespace {

constexpr int kHeads = 2;  // in flight

template <typename T, typename Cache, int kCount>
__global__ void __launch_bounds__(kHeadThreads, 4)
    cache_write_kernel(CacheWriteParams p, uint32_t blocks_a_row) {
  const auto [b, s, i] = head_place(blocks_a_row, kCount);
  if (s >= p.length || i >= p.head_dim) return;
  const int64_t slot = slot_of_column(p, b, s);
  if (slot < 0) return;
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides.b + s * p.k_strides.s + i;
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides.b + s * p.v_strides.s + i;
  Cache* k_cache =
      static_cast<Cache*>(p.k_cache) + b * p.k_cache_strides.b + slot * p.k_cache_strides.s + i;
  Cache* v_cache =
      static_cast<Cache*>(p.v_cache) + b * p.v_cache_strides.b + slot * p.v_cache_strides.s + i;
  for (int64_t first = threadIdx.y; first < p.kv_heads; first += blockDim.y * kHeads) {
    Pack<T, kCount> k_packs[kHeads], v_packs[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int64_t h = first + j * blockDim.y;
      if (h >= p.kv_heads) break;
      k_packs[j] = load_pack_once<kCount>(k + h * p.k_strides.h);
      v_packs[j] = load_pack_once<kCount>(v + h * p.v_strides.h);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int64_t h = first + j * blockDim.y;
      if (h >= p.kv_heads) break;
      write_pack(k_cache + h * p.k_cache_strides.h, k_packs[j]);
      write_pack(v_cache + h * p.v_cache_strides.h, v_packs[j]);
    }
  }
}

template <typename T, typename Cache, int kCount>
void run(const CacheWriteParams& p, CudaCall& call) {
  const HeadGrid shape = head_grid(ceil_div(p.head_dim, kCount), p.kv_heads, p.batch, p.length);
  launch(call, "cache_write", cache_write_kernel<T, Cache, kCount>, shape.grid, shape.block, 0, p,
         shape.blocks_a_row);
}

}  // namespace

void cache_write(const CacheWriteParams& p, CudaCall& call) {
  dispatch(p.dtype, [&](auto t) {
    dispatch(p.cache_dtype, [&](auto c) {
      using T = typename decltype(t)::type;
      using Cache = typename decltype(c)::type;
      constexpr int kCount = pack_count<T, Cache>();
      if (p.head_dim % kCount == 0 && heads_of_16_bytes<T>(p.k, p.k_strides) &&
          heads_of_16_bytes<T>(p.v, p.v_strides) &&
          heads_of_16_bytes<Cache>(p.k_cache, p.k_cache_strides) &&
          heads_of_16_bytes<Cache>(p.v_cache, p.v_cache_strides))
        run<T, Cache, kCount>(p, call);
      else
        run<T, Cache, 1>(p, call);
    });
  });
}

}  // namespace gemma2::cuda
