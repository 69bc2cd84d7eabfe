// rope: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the halves of each head, in float32, rounded once.
// rope_cache: the same, with k rotated straight into its cache slot and v copied beside it: k and v are
// read once and written once. Both are bound by memory.
// Called by gemma2/ops/rope.py; reference: gemma2/reference.py.

#include "cpu/cache_rows.h"
#include "cpu/kernels.h"

namespace gemma2::GEMMA2_ISA {
namespace {

template <typename From, typename To>
void rotate(const From* x, const float* cos, const float* sin, To* out, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for_lanes(half, [&](int64_t i, int64_t lanes) {
    const vf32 x1 = load_upto(x + i, lanes), x2 = load_upto(x + half + i, lanes);
    const vf32 c = load_upto(cos + i, lanes), s = load_upto(sin + i, lanes);
    store_upto(out + i, x1 * c - x2 * s, lanes);
    store_upto(out + half + i, x2 * c + x1 * s, lanes);
  });
}

// One thread's share of [batch x columns]: all heads of a column use the same cos and sin.
template <typename F>
void for_columns(const RopeParams& p, const F& body) {
  const int64_t work = (p.q_heads + p.kv_heads) * p.head_dim + 1;
  parallel(p.batch * p.length, 16384 / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.length, s = item % p.length;
      const int64_t table = b * p.table_batch_stride + s * (p.head_dim / 2);
      body(b, s, p.cos + table, p.sin + table);
    }
  });
}

template <typename T>
void rotate_queries(const RopeParams& p, int64_t b, int64_t s, const float* cos, const float* sin) {
  const Strides3 &in = p.q_strides, &out = p.q_out_strides;
  for (int64_t h = 0; h < p.q_heads; ++h)
    rotate(static_cast<const T*>(p.q) + b * in.b + h * in.h + s * in.s, cos, sin,
           static_cast<T*>(p.q_out) + b * out.b + h * out.h + s * out.s, p.head_dim);
}

}  // namespace

void rope(const RopeParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for_columns(p, [&](int64_t b, int64_t s, const float* cos, const float* sin) {
      rotate_queries<T>(p, b, s, cos, sin);
      const Strides3 &in = p.k_strides, &out = p.k_out_strides;
      for (int64_t h = 0; h < p.kv_heads; ++h)
        rotate(static_cast<const T*>(p.k) + b * in.b + h * in.h + s * in.s, cos, sin,
               static_cast<T*>(p.k_out) + b * out.b + h * out.h + s * out.s, p.head_dim);
    });
  });
}

void rope_cache(const RopeParams& p, const CacheWriteParams& c) {
  dispatch(p.dtype, [&](auto t) {
    dispatch(c.cache_dtype, [&](auto to) {
      using T = typename decltype(t)::type;
      using To = typename decltype(to)::type;
      for_columns(p, [&](int64_t b, int64_t s, const float* cos, const float* sin) {
        rotate_queries<T>(p, b, s, cos, sin);
        const CacheRow row = cache_row(c, b);
        if (s < row.begin || s >= row.end) return;
        const int64_t slot = row.slot(s);
        const Strides3 &ks = c.k_strides, &vs = c.v_strides;
        const Strides3 &kc = c.k_cache_strides, &vc = c.v_cache_strides;
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          rotate(static_cast<const T*>(c.k) + b * ks.b + h * ks.h + s * ks.s, cos, sin,
                 static_cast<To*>(c.k_cache) + b * kc.b + h * kc.h + slot * kc.s, p.head_dim);
          copy_row(static_cast<const T*>(c.v) + b * vs.b + h * vs.h + s * vs.s,
                   static_cast<To*>(c.v_cache) + b * vc.b + h * vc.h + slot * vc.s, p.head_dim);
        }
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
