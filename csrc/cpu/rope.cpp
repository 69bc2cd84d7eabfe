// rope: rotates the halves of every head of q and k, in float32, rounded once.
// rope_cache: the same, with k rotated straight into its cache slot (rounded once, to the cache's
// dtype) and v copied beside it: q, k and v are read once, and no rotated copy of k exists.
//
// Bound by memory: 3 FLOP an element. A row of cos and sin serves all heads of a token. Called by
// gemma2/ops/rope.py; reference: gemma2/reference.py.

#include "common/rope.h"

#include "common/cache_slots.h"
#include "cpu/cache_rows.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should get at least

// Not inlined: rope and rope_cache must give the same bits, so they share one compiled copy.
template <typename In, typename Out>
__attribute__((noinline)) void rotate_row(const In* x, const float* cos, const float* sin, Out* out,
                                          int64_t half) {
  for_lanes(half, [&](int64_t i, int64_t lanes) {
    vf32 y1, y2;
    rotate_pair(load_upto(x + i, lanes), load_upto(x + half + i, lanes), load_upto(cos + i, lanes),
                load_upto(sin + i, lanes), y1, y2);
    store_upto(out + i, y1, lanes);
    store_upto(out + half + i, y2, lanes);
  });
}

// One token of one batch row: where its heads lie and its row of the table.
struct Token {
  int64_t b, s;
  const float* cos;
  const float* sin;
};

Token token(const RopeParams& p, int64_t i) {
  const int64_t b = i / p.length, s = i % p.length;
  const int64_t at = b * p.table_batch_stride + s * (p.head_dim / 2);
  return {b, s, p.cos + at, p.sin + at};
}

template <typename T>
void rotate_heads(const Token& t, const void* x, const Strides3& x_strides, void* out,
                  const Strides3& out_strides, int64_t heads, int64_t half) {
  const T* from = static_cast<const T*>(x) + t.b * x_strides.b + t.s * x_strides.s;
  T* to = static_cast<T*>(out) + t.b * out_strides.b + t.s * out_strides.s;
  for (int64_t h = 0; h < heads; ++h)
    rotate_row(from + h * x_strides.h, t.cos, t.sin, to + h * out_strides.h, half);
}

template <typename T, typename Cache>
void write_heads(const Token& t, const CacheWriteParams& p, int64_t half) {
  const int64_t base = p.k_base == nullptr ? 0 : p.k_base[t.b];
  const ColumnRange columns =
      written_columns(p.q_start[t.b], p.kv_len[t.b], base, p.length, p.capacity);
  if (t.s < columns.begin || t.s >= columns.end) return;
  const int64_t slot = write_slot(p.q_start[t.b] + t.s, base, p.capacity);
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    rotate_row(
        static_cast<const T*>(p.k) + t.b * p.k_strides.b + h * p.k_strides.h + t.s * p.k_strides.s,
        t.cos, t.sin,
        static_cast<Cache*>(p.k_cache) + t.b * p.k_cache_strides.b + h * p.k_cache_strides.h +
            slot * p.k_cache_strides.s,
        half);
    copy_row(
        static_cast<const T*>(p.v) + t.b * p.v_strides.b + h * p.v_strides.h + t.s * p.v_strides.s,
        static_cast<Cache*>(p.v_cache) + t.b * p.v_cache_strides.b + h * p.v_cache_strides.h +
            slot * p.v_cache_strides.s,
        p.head_dim);
  }
}

int64_t grain(const RopeParams& p) {
  return kGrain / ((p.q_heads + p.kv_heads) * p.head_dim + 1) + 1;
}

}  // namespace

void rope(const RopeParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(p.batch * p.length, grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Token at = token(p, i);
        const int64_t half = p.head_dim / 2;
        rotate_heads<T>(at, p.q, p.q_strides, p.q_out, p.q_out_strides, p.q_heads, half);
        rotate_heads<T>(at, p.k, p.k_strides, p.k_out, p.k_out_strides, p.kv_heads, half);
      }
    });
  });
}

void rope_cache(const RopeParams& p, const CacheWriteParams& cache) {
  dispatch(p.dtype, [&](auto t) {
    dispatch(cache.cache_dtype, [&](auto c) {
      using T = typename decltype(t)::type;
      parallel(p.batch * p.length, grain(p), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Token at = token(p, i);
          const int64_t half = p.head_dim / 2;
          rotate_heads<T>(at, p.q, p.q_strides, p.q_out, p.q_out_strides, p.q_heads, half);
          write_heads<T, typename decltype(c)::type>(at, cache, half);
        }
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
