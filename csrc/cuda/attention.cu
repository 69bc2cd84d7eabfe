// attention: which kernel serves a call. The contract: docs/attention.md.
//
//   any      float32, mixed dtypes, rows that are not aligned to 16 bytes (attention_any.cu)
//   decode   at most 16 rows (queries x heads of a group) a key/value head (attention_decode.cu)
//   prefill  all else, and everything deterministic, with sums that are closed at fixed positions
//            (attention_prefill.cu, attention_merge.cu)
//
// A deterministic call must not change its bits with where a tensor happens to lie: its rows that
// are not aligned are copied first, a warp a row, element by element.
//
// Called by csrc/bindings/attention.cpp.

#include "cuda/launch.h"

namespace gemma2::cuda {

void attention_any(const AttentionParams&, CudaCall&);
void attention_decode(const AttentionParams&, CudaCall&);
bool attention_decode_takes(const AttentionParams&);
void attention_prefill(const AttentionParams&, CudaCall&);

namespace {

constexpr int kThreads = 256;
constexpr int kBlockRows = kThreads / kWarp;

// [B, H, S, D] of 16-bit numbers, to be laid out densely.
struct Copy {
  const uint16_t* from;
  uint16_t* to;
  Strides3 strides;
  int64_t heads, length, rows;
  int dim;
};

__global__ void __launch_bounds__(kThreads) copy_kernel(Copy c) {
  const int64_t row = int64_t{blockIdx.x} * kBlockRows + threadIdx.x / kWarp;
  if (row >= c.rows) return;
  const int64_t sequence = row / c.length;
  const uint16_t* from = c.from + sequence / c.heads * c.strides.b +
                         sequence % c.heads * c.strides.h + row % c.length * c.strides.s;
  for (int d = threadIdx.x % kWarp; d < c.dim; d += kWarp)
    store(c.to + row * c.dim + d, load(from + d));
}

bool aligned(const void* p, const Strides3& s) {
  return rows_of_16_bytes<bf16_t>(p, s.b) && rows_of_16_bytes<bf16_t>(p, s.h) &&
         rows_of_16_bytes<bf16_t>(p, s.s);
}

void align(const void*& x, Strides3& strides, int64_t batch, int64_t heads, int64_t length,
           int64_t dim, CudaCall& call) {
  if (aligned(x, strides)) return;
  const int64_t rows = batch * heads * length;
  void* to = allocate(call, rows * dim * int64_t{sizeof(uint16_t)});
  const Copy copy = {static_cast<const uint16_t*>(x),
                     static_cast<uint16_t*>(to),
                     strides,
                     heads,
                     length,
                     rows,
                     static_cast<int>(dim)};
  launch(call, "attention copy", copy_kernel, ceil_div(rows, kBlockRows), kThreads, 0, copy);
  x = to;
  strides = {heads * length * dim, length * dim, dim};
}

}  // namespace

void attention(const AttentionParams& p, CudaCall& call) {
  if (p.batch == 0 || p.q_heads == 0 || p.q_length == 0) return;
  const bool sixteen_bits =
      p.q_dtype != DType::f32 && p.kv_dtype == p.q_dtype && aligned(p.out, p.out_strides);
  if (sixteen_bits && p.deterministic) {
    AttentionParams copied = p;
    align(copied.q, copied.q_strides, p.batch, p.q_heads, p.q_length, p.head_dim, call);
    align(copied.k, copied.k_strides, p.batch, p.kv_heads, p.capacity, p.head_dim, call);
    align(copied.v, copied.v_strides, p.batch, p.kv_heads, p.capacity, p.head_dim, call);
    attention_prefill(copied, call);
  } else if (!sixteen_bits || !aligned(p.q, p.q_strides) || !aligned(p.k, p.k_strides) ||
             !aligned(p.v, p.v_strides)) {
    attention_any(p, call);
  } else if (attention_decode_takes(p)) {
    attention_decode(p, call);
  } else {
    attention_prefill(p, call);
  }
}

}  // namespace gemma2::cuda
