// rms_norm and add_rms_norm: out = x * rsqrt(mean(x^2) + eps) * (1 + w), in float32, rounded once.
//
// A row is read once from memory and once more from the cache (9 KB at 2304 x float32), so both are
// bound by memory; add_rms_norm moves the residual stream once in and once out instead of twice
// each. Called by gemma2/ops/rms_norm.py; reference: gemma2/reference.py.

#include "common/mutate.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should get at least

float gain_offset() { return mutated(Mutation::norm_without_one) ? 0.f : 1.f; }

// rsqrt(mean(x^2) + eps). Four partial sums per lane keep the adders busy.
template <typename T>
float inverse_rms(const T* x, int64_t n, float eps) {
  vf32 sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) {
      const vf32 v = load(x + i + u * kLanes);
      sum[u] += v * v;
    }
  for (; i < n; i += kLanes) {
    const vf32 v = load_upto(x + i, min64(kLanes, n - i));
    sum[0] += v * v;
  }
  const float mean = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)n;
  return 1.0f / __builtin_sqrtf(mean + eps);
}

template <typename X, typename W>
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(p.weight);
  const float offset = gain_offset();
  for (int64_t r = begin; r < end; ++r) {
    const X* x = static_cast<const X*>(p.x) + r * p.x_stride;
    W* out = static_cast<W*>(p.out) + r * p.hidden;
    const float inv = inverse_rms(x, p.hidden, p.eps);
    for_lanes(p.hidden, [&](int64_t i, int64_t lanes) {
      const vf32 gain = load_upto(weight + i, lanes) + offset;
      store_upto(out + i, load_upto(x + i, lanes) * inv * gain, lanes);
    });
  }
}

template <typename R, typename X, typename W>
void add_rms_norm_rows(const AddRmsNormParams& p, int64_t begin, int64_t end) {
  const W* post = static_cast<const W*>(p.post_weight);
  const W* pre = static_cast<const W*>(p.pre_weight);
  const float offset = gain_offset();
  for (int64_t r = begin; r < end; ++r) {
    const R* residual = static_cast<const R*>(p.residual) + r * p.hidden;
    R* residual_out = static_cast<R*>(p.residual_out) + r * p.hidden;
    const X* x = static_cast<const X*>(p.x) + r * p.x_stride;
    W* y = static_cast<W*>(p.y) + r * p.hidden;
    const float inv = inverse_rms(x, p.hidden, p.eps);
    for_lanes(p.hidden, [&](int64_t i, int64_t lanes) {
      const vf32 gain = load_upto(post + i, lanes) + offset;
      const vf32 sum = load_upto(residual + i, lanes) + load_upto(x + i, lanes) * inv * gain;
      store_upto(residual_out + i, sum, lanes);
    });
    const float inv_out = inverse_rms(residual_out, p.hidden, p.eps);
    for_lanes(p.hidden, [&](int64_t i, int64_t lanes) {
      const vf32 gain = load_upto(pre + i, lanes) + offset;
      store_upto(y + i, load_upto(residual_out + i, lanes) * inv_out * gain, lanes);
    });
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  dispatch(p.x_dtype, [&](auto x) {
    dispatch(p.weight_dtype, [&](auto w) {
      parallel(p.rows, kGrain / (p.hidden + 1) + 1, [&](int64_t begin, int64_t end) {
        rms_norm_rows<typename decltype(x)::type, typename decltype(w)::type>(p, begin, end);
      });
    });
  });
}

void add_rms_norm(const AddRmsNormParams& p) {
  dispatch(p.residual_dtype, [&](auto r) {
    dispatch(p.x_dtype, [&](auto x) {
      dispatch(p.weight_dtype, [&](auto w) {
        parallel(p.rows, kGrain / (p.hidden + 1) + 1, [&](int64_t begin, int64_t end) {
          add_rms_norm_rows<typename decltype(r)::type, typename decltype(x)::type,
                            typename decltype(w)::type>(p, begin, end);
        });
      });
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
