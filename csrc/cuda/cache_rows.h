// What rope, rope_cache and cache_write share: how threads lie on the heads of tokens, and the
// slots that columns go to.
#pragma once

#include "common/cache_slots.h"
#include "cuda/launch.h"
#include "cuda/pack.h"

namespace gemma2::cuda {

constexpr int kHeadThreads = 256;  // of a block, at most

// Threads of a block lie x along the packs of a head, y over heads, z over tokens (columns of the
// call); blocks lie x over the tokens of one batch row after the other, y along long heads.
struct HeadGrid {
  dim3 grid, block;
  uint32_t blocks_a_row;
};

// `packs` a head. A thread takes one head where that keeps the device busy anyhow, else four: what
// belongs to the token, its angles and its slot, is then fetched once for four.
inline HeadGrid head_grid(int64_t packs, int64_t heads, int64_t batch, int64_t length) {
  constexpr int64_t kBusy = 1 << 17;  // threads: 64 multiprocessors full of them
  if (packs == 0 || heads == 0 || batch == 0 || length == 0) return {dim3(0), dim3(1), 1};
  const int64_t x = packs < kHeadThreads ? packs : kHeadThreads;
  const int64_t a_thread = batch * length * heads * packs < kBusy ? 1 : 4;
  int64_t y = ceil_div(heads, a_thread);
  if (x * y > kHeadThreads) y = kHeadThreads / x;
  int64_t z = kHeadThreads / (x * y);
  if (z > 64) z = 64;  // the hardware's limit
  if (z > length) z = length;
  const int64_t blocks_a_row = ceil_div(length, z);
  return {dim3(batch * blocks_a_row, ceil_div(packs, x)), dim3(x, y, z),
          static_cast<uint32_t>(blocks_a_row)};
}

// Where this thread's token and its pack's first element of `count` are.
struct HeadPlace {
  int64_t b, s, i;
};
GEMMA2_DEVICE HeadPlace head_place(uint32_t blocks_a_row, int count) {
  const uint32_t b = blockIdx.x / blocks_a_row, block = blockIdx.x - b * blocks_a_row;
  return {b, int64_t{block} * blockDim.z + threadIdx.z,
          (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * count};
}

template <typename T>
bool heads_of_16_bytes(const void* p, const Strides3& strides) {
  return rows_of_16_bytes<T>(p, strides.b) && rows_of_16_bytes<T>(p, strides.h) &&
         rows_of_16_bytes<T>(p, strides.s);
}

// The slot of column s of row b, or -1 if the column is not written.
GEMMA2_DEVICE int64_t slot_of_column(const CacheWriteParams& p, int64_t b, int64_t s) {
  const int64_t q_start = p.q_start[b], kv_len = p.kv_len[b];
  const int64_t base = p.k_base == nullptr ? 0 : p.k_base[b];
  const ColumnRange columns = written_columns(q_start, kv_len, base, p.length, p.capacity);
  if (s < columns.begin || s >= columns.end) return -1;
  return write_slot(q_start + s, base, p.capacity);
}

// Rounded once to the cache's dtype; of the same dtype, the bits as they are.
template <typename Cache, typename T, int kCount>
GEMMA2_DEVICE void write_pack(Cache* to, const Pack<T, kCount>& v) {
  float wide[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) wide[e] = element(v, e);
  store_pack(to, pack_of<Cache>(wide));
}
template <typename T, int kCount>
GEMMA2_DEVICE void write_pack(T* to, const Pack<T, kCount>& v) {
  store_pack(to, v);
}

}  // namespace gemma2::cuda
