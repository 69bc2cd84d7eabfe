// attention, deterministic: out and log-sum-exp of rows whose sums were made side by side
// (attention_prefill.cu), merged in ascending order.
//
// A block is a row, a thread 4 columns; 8 parts are loaded before the first is merged. Planned: at
// most 64 threads, 96 registers. Bound by latency: a part is 4 (D + 4) bytes a row, written just
// before. dtypes and sizes are run-time values: one instantiation.

#include "common/visibility.h"
#include "cuda/attention_sums.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 64;
__global__ void __launch_bounds__(kThreads)
    merge_kernel(AttentionParams p, Parts parts, int group) {
  constexpr int kAtOnce = 8;
  const int rows = static_cast<int>(p.q_length) * group;
  const int64_t sequence = blockIdx.x / rows, row = blockIdx.x % rows;
  const Sums* sums = parts.sums + int64_t{blockIdx.x} * parts.parts;
  const float4* o =
      reinterpret_cast<const float4*>(parts.o + int64_t{blockIdx.x} * parts.parts * p.head_dim) +
      threadIdx.x;
  const int64_t stride = p.head_dim / 4;
  Sums total = {};
  float4 result = {0, 0, 0, 0};
  for (int first = 0; first < parts.parts; first += kAtOnce) {
    Sums part[kAtOnce];
    float4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= parts.parts) break;
      part[i] = load(sums + first + i);
      x[i] = load(o + (first + i) * stride);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= parts.parts) break;
      const Weights weights = merge(total, part[i]);
      result.x = merged(result.x, x[i].x, weights);
      result.y = merged(result.y, x[i].y, weights);
      result.z = merged(result.z, x[i].z, weights);
      result.w = merged(result.w, x[i].w, weights);
    }
  }
  const int64_t b = sequence / p.kv_heads, query = row / group;
  const int64_t head = query_head(sequence % p.kv_heads, row % group, group, p.kv_heads);
  const bool empty = total.sum == 0;
  const float inverse = empty ? 0.0f : 1.0f / total.sum;
  const int64_t at = b * p.out_strides.b + head * p.out_strides.h + query * p.out_strides.s;
  store(reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at) + threadIdx.x,
        uint2{pack_pair(p.q_dtype, result.x * inverse, result.y * inverse),
              pack_pair(p.q_dtype, result.z * inverse, result.w * inverse)});
  if (threadIdx.x == 0)
    store(p.lse + (b * p.q_heads + head) * p.q_length + query,
          empty ? -INFINITY : log_sum_exp(total.sum, total.exact, total.most));
}

}  // namespace

void attention_merge(const AttentionParams& p, const Parts& parts, CudaCall& call) {
  const int group = static_cast<int>(p.q_heads / p.kv_heads);
  launch(call, "attention_merge", merge_kernel, p.batch * p.q_heads * p.q_length, p.head_dim / 4, 0,
         p, parts, group);
}

}  // namespace gemma2::cuda
