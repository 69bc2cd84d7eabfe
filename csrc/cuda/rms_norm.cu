// rms_norm:     out = x rsqrt(mean(x^2) + eps) (1 + w)
// add_rms_norm: h = residual + rms(x; post), rounded once to the residual's dtype; y = rms(h; pre).
// In float32, rounded once.
//
// A block takes a row and keeps it in registers between the sum and the product, h as rounded too:
// every tensor of rows is moved once, 16 bytes at a time. Weights come from the caches.
//
//                  bytes an element (bf16)   16-byte loads in flight a thread, hidden 2304 to 8192
//   rms_norm       2 x + 2 out               4: x and w of two packs
//   add_rms_norm   2 residual + 2 x + 2 h + 2 y   8: residual, x, post, pre
//
// Threads: one a pack up to 128 packs, one for two up to 1024 (2304 bf16: 160 threads, of which 144
// have work; 3584: 224; 4608: 288), one for four up to 2048. Planned at two packs: rms_norm 40
// registers, 48 warps on sm_80 and sm_90; add_rms_norm 64 registers, 32 warps, with 128 KB in
// flight when all of them load, half of it weights that the caches have. Bound by memory from some
// hundred rows on, by latency (loads, one or two barriers, store) below. One block a row and no
// loop over rows: the weights that a loop would keep in registers come from the first-level cache,
// and a step of few rows has the shape of one of many.
//
// Other dtypes than the models', rows that do not start at 16 bytes and longer ones are read twice
// by a kernel that takes one element at a time, in the same order of sums: alignment changes no
// bit. Called by csrc/bindings/rms_norm.cpp.

#include <type_traits>

#include "common/mutate.h"
#include "cuda/launch.h"
#include "cuda/pack.h"
#include "cuda/reduce.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 512;  // of a block, at most

// For the sum over x and the one over h.
struct Partials {
  BlockPartials of_x, of_h;
};

GEMMA2_DEVICE float gain(float w) {
  return w + (mutated(Mutation::norm_without_one) ? 0.0f : 1.0f);
}
// rsqrt(mean(v^2) + eps) of the row whose squares the block's threads have summed up to `sum`.
GEMMA2_DEVICE float inverse_rms(float sum, float inverse_hidden, float eps,
                                BlockPartials& partials) {
  return rsqrtf(sum_block<kThreads / kWarp>(sum, partials) * inverse_hidden + eps);
}
template <typename T, int kCount>
GEMMA2_DEVICE float add_squares(float sum, const Pack<T, kCount>& v) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) sum += element(v, e) * element(v, e);
  return sum;
}

// The thread's packs of a row: pack threadIdx.x, then every blockDim.x-th, zeros beyond the row.
template <typename T, int kCount, int kPacks>
struct RowPacks {
  Pack<T, kCount> at[kPacks];
};
GEMMA2_DEVICE int pack_start(int j, int count) {
  return (static_cast<int>(threadIdx.x) + j * static_cast<int>(blockDim.x)) * count;
}
template <int kCount, int kPacks, bool kOnce, typename T>
GEMMA2_DEVICE RowPacks<T, kCount, kPacks> load_row(const T* row, int hidden) {
  RowPacks<T, kCount, kPacks> v;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int i = pack_start(j, kCount);
    if (i < hidden)
      v.at[j] = kOnce ? load_pack_once<kCount>(row + i) : load_pack<kCount>(row + i);
    else
      v.at[j] = {};
  }
  return v;
}

// out = v inv (1 + w)
template <int kCount, int kPacks, typename V, typename W>
GEMMA2_DEVICE void store_normed(W* out, const RowPacks<V, kCount, kPacks>& v, float inv,
                                const RowPacks<W, kCount, kPacks>& w, int hidden) {
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int i = pack_start(j, kCount);
    if (i >= hidden) break;
    float y[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) y[e] = element(v.at[j], e) * inv * gain(element(w.at[j], e));
    store_pack(out + i, pack_of<W>(y));
  }
}

template <typename X, typename W, int kPacks>
__global__ void __launch_bounds__(kThreads, kPacks <= 2 ? 3 : 1)
    rms_norm_kernel(RmsNormParams p, float inverse_hidden) {
  constexpr int kCount = pack_count<X, W>();
  const int64_t row = blockIdx.x;
  const int hidden = static_cast<int>(p.hidden);
  const auto x =
      load_row<kCount, kPacks, true>(static_cast<const X*>(p.x) + row * p.x_stride, hidden);
  const auto w = load_row<kCount, kPacks, false>(static_cast<const W*>(p.weight), hidden);

  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) sum = add_squares(sum, x.at[j]);
  const float inv = inverse_rms(sum, inverse_hidden, p.eps, static_shared<BlockPartials>());

  store_normed(static_cast<W*>(p.out) + row * p.hidden, x, inv, w, hidden);
}

template <typename R, typename X, typename W, int kPacks>
__global__ void __launch_bounds__(kThreads, kPacks <= 2 ? 2 : 1)
    add_rms_norm_kernel(AddRmsNormParams p, float inverse_hidden) {
  constexpr int kCount = pack_count<R, X, W>();
  const int64_t row = blockIdx.x;
  const int hidden = static_cast<int>(p.hidden);
  Partials& partials = static_shared<Partials>();
  // Not load_once: h may be written where the residual lies.
  const auto x =
      load_row<kCount, kPacks, false>(static_cast<const X*>(p.x) + row * p.x_stride, hidden);
  const auto residual =
      load_row<kCount, kPacks, false>(static_cast<const R*>(p.residual) + row * p.hidden, hidden);
  const auto post = load_row<kCount, kPacks, false>(static_cast<const W*>(p.post_weight), hidden);
  const auto pre = load_row<kCount, kPacks, false>(static_cast<const W*>(p.pre_weight), hidden);

  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) sum = add_squares(sum, x.at[j]);
  const float inv = inverse_rms(sum, inverse_hidden, p.eps, partials.of_x);

  RowPacks<R, kCount, kPacks> h;
  R* residual_out = static_cast<R*>(p.residual_out) + row * p.hidden;
  sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    float exact[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      exact[e] =
          element(residual.at[j], e) + element(x.at[j], e) * inv * gain(element(post.at[j], e));
    h.at[j] = pack_of<R>(exact);
    sum = add_squares(sum, h.at[j]);
    const int i = pack_start(j, kCount);
    if (i < hidden) store_pack(residual_out + i, h.at[j]);
  }
  const float inv_h = inverse_rms(sum, inverse_hidden, p.eps, partials.of_h);

  store_normed(static_cast<W*>(p.y) + row * p.hidden, h, inv_h, pre, hidden);
}

// ---- Any dtypes, alignment and length ----

GEMMA2_DEVICE float load_as(DType t, const void* p, int64_t i) {
  if (t == DType::f32) return load(static_cast<const float*>(p) + i);
  if (t == DType::bf16) return to_float(load(static_cast<const bf16_t*>(p) + i));
  return to_float(load(static_cast<const f16_t*>(p) + i));
}
GEMMA2_DEVICE void store_as(DType t, void* p, int64_t i, float v) {
  if (t == DType::f32) return store(static_cast<float*>(p) + i, v);
  if (t == DType::bf16) return store(static_cast<bf16_t*>(p) + i, from_float<bf16_t>(v));
  store(static_cast<f16_t*>(p) + i, from_float<f16_t>(v));
}

// Calls f(i) for the elements of the thread's packs of `count`, as the kernels above walk them.
template <typename F>
GEMMA2_DEVICE void for_elements(int64_t hidden, int count, const F& f) {
  for (int64_t first = int64_t{threadIdx.x} * count; first < hidden;
       first += int64_t{blockDim.x} * count)
    for (int64_t i = first; i < first + count && i < hidden; ++i) f(i);
}

__global__ void __launch_bounds__(kThreads)
    rms_norm_any_kernel(RmsNormParams p, float inverse_hidden, int count) {
  const int64_t x = blockIdx.x * p.x_stride, out = blockIdx.x * p.hidden;
  float sum = 0.0f;
  for_elements(p.hidden, count, [&](int64_t i) {
    const float v = load_as(p.x_dtype, p.x, x + i);
    sum += v * v;
  });
  const float inv = inverse_rms(sum, inverse_hidden, p.eps, static_shared<BlockPartials>());
  for_elements(p.hidden, count, [&](int64_t i) {
    const float w = gain(load_as(p.weight_dtype, p.weight, i));
    store_as(p.weight_dtype, p.out, out + i, load_as(p.x_dtype, p.x, x + i) * inv * w);
  });
}

__global__ void __launch_bounds__(kThreads)
    add_rms_norm_any_kernel(AddRmsNormParams p, float inverse_hidden, int count) {
  const int64_t x = blockIdx.x * p.x_stride, dense = blockIdx.x * p.hidden;
  Partials& partials = static_shared<Partials>();
  float sum = 0.0f;
  for_elements(p.hidden, count, [&](int64_t i) {
    const float v = load_as(p.x_dtype, p.x, x + i);
    sum += v * v;
  });
  const float inv = inverse_rms(sum, inverse_hidden, p.eps, partials.of_x);
  sum = 0.0f;
  for_elements(p.hidden, count, [&](int64_t i) {
    const float w = gain(load_as(p.weight_dtype, p.post_weight, i));
    const float exact =
        load_as(p.residual_dtype, p.residual, dense + i) + load_as(p.x_dtype, p.x, x + i) * inv * w;
    store_as(p.residual_dtype, p.residual_out, dense + i, exact);
    const float h = load_as(p.residual_dtype, p.residual_out, dense + i);
    sum += h * h;
  });
  const float inv_h = inverse_rms(sum, inverse_hidden, p.eps, partials.of_h);
  for_elements(p.hidden, count, [&](int64_t i) {
    const float w = gain(load_as(p.weight_dtype, p.pre_weight, i));
    const float h = load_as(p.residual_dtype, p.residual_out, dense + i);
    store_as(p.weight_dtype, p.y, dense + i, h * inv_h * w);
  });
}

// ---- Launches ----

// How a block walks a row of `hidden` elements in packs of `count`. Depends on nothing else, as the
// order of the sum does.
struct Walk {
  int count, packs_a_thread, threads;
};
Walk walk(int64_t hidden, int count) {
  const int64_t packs = ceil_div(hidden, count);
  const int a_thread = packs <= 128 ? 1 : packs <= 2 * kThreads ? 2 : 4;
  const int64_t threads = ceil_div(ceil_div(packs, a_thread), kWarp) * kWarp;
  return {count, a_thread, static_cast<int>(threads < kThreads ? threads : kThreads)};
}
bool fits_registers(const Walk& w, int64_t hidden) {
  return hidden <= int64_t{w.count} * w.packs_a_thread * w.threads;
}

// Calls f with the number of packs a thread as a constant.
template <int kPacks>
struct Packs {
  static constexpr int value = kPacks;
};
template <typename F>
void with_packs(const Walk& w, const F& f) {
  if (w.packs_a_thread == 1) return f(Packs<1>{});
  if (w.packs_a_thread == 2) return f(Packs<2>{});
  f(Packs<4>{});
}

// The dtypes that models have: float32, bfloat16, and float16 with a float32 residual stream.
template <typename X, typename W>
constexpr bool kCompiled = std::is_same_v<X, W> || (sizeof(X) == 4 && std::is_same_v<W, f16_t>);
template <typename R, typename X, typename W>
constexpr bool kAddCompiled = std::is_same_v<X, W> && kCompiled<R, W> && !std::is_same_v<R, f16_t>;

int elements_of_16_bytes(DType a, DType b) {
  return 16 / (size_of(a) > size_of(b) ? size_of(a) : size_of(b));
}

}  // namespace

void rms_norm(const RmsNormParams& p, CudaCall& call) {
  if (p.rows == 0 || p.hidden == 0) return;
  const Walk w = walk(p.hidden, elements_of_16_bytes(p.x_dtype, p.weight_dtype));
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  bool done = false;
  dispatch(p.x_dtype, [&](auto x) {
    dispatch(p.weight_dtype, [&](auto weight) {
      using X = typename decltype(x)::type;
      using W = typename decltype(weight)::type;
      if constexpr (kCompiled<X, W>) {
        if (!fits_registers(w, p.hidden) || !rows_of_16_bytes<X>(p.x, p.x_stride) ||
            !rows_of_16_bytes<W>(p.weight, 0) || !rows_of_16_bytes<W>(p.out, p.hidden))
          return;
        with_packs(w, [&](auto packs) {
          launch(call, "rms_norm", rms_norm_kernel<X, W, decltype(packs)::value>, p.rows, w.threads,
                 0, p, inverse_hidden);
        });
        done = true;
      }
    });
  });
  if (!done)
    launch(call, "rms_norm", rms_norm_any_kernel, p.rows, w.threads, 0, p, inverse_hidden, w.count);
}

void add_rms_norm(const AddRmsNormParams& p, CudaCall& call) {
  if (p.rows == 0 || p.hidden == 0) return;
  const int widest = elements_of_16_bytes(p.x_dtype, p.weight_dtype);
  const Walk w = walk(p.hidden, p.residual_dtype == DType::f32 ? 4 : widest);
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  bool done = false;
  dispatch(p.residual_dtype, [&](auto r) {
    dispatch(p.x_dtype, [&](auto x) {
      dispatch(p.weight_dtype, [&](auto weight) {
        using R = typename decltype(r)::type;
        using X = typename decltype(x)::type;
        using W = typename decltype(weight)::type;
        if constexpr (kAddCompiled<R, X, W>) {
          if (!fits_registers(w, p.hidden) || !rows_of_16_bytes<R>(p.residual, p.hidden) ||
              !rows_of_16_bytes<X>(p.x, p.x_stride) || !rows_of_16_bytes<W>(p.post_weight, 0) ||
              !rows_of_16_bytes<W>(p.pre_weight, 0) ||
              !rows_of_16_bytes<R>(p.residual_out, p.hidden) || !rows_of_16_bytes<W>(p.y, p.hidden))
            return;
          with_packs(w, [&](auto packs) {
            launch(call, "add_rms_norm", add_rms_norm_kernel<R, X, W, decltype(packs)::value>,
                   p.rows, w.threads, 0, p, inverse_hidden);
          });
          done = true;
        }
      });
    });
  });
  if (!done)
    launch(call, "add_rms_norm", add_rms_norm_any_kernel, p.rows, w.threads, 0, p, inverse_hidden,
           w.count);
}

}  // namespace gemma2::cuda
