// attention: which kernel serves a call. The contract: docs/attention.md.
//
//   any      float32, mixed dtypes, rows that are not aligned to 16 bytes (attention_any.cu)
//   decode   at most 16 rows (queries x heads of a group) a key/value head (attention_decode.cu)
//   prefill  all else, and everything deterministic (attention_prefill.cu)
//
// Called by csrc/bindings/attention.cpp.

#include "cuda/launch.h"

namespace gemma2::cuda {

void attention_any(const AttentionParams&, CudaCall&);
void attention_decode(const AttentionParams&, CudaCall&);
bool attention_decode_takes(const AttentionParams&);
void attention_prefill(const AttentionParams&, CudaCall&);

namespace {

template <typename T>
bool aligned(const void* p, const Strides3& s) {
  return rows_of_16_bytes<T>(p, s.b) && rows_of_16_bytes<T>(p, s.h) && rows_of_16_bytes<T>(p, s.s);
}

}  // namespace

void attention(const AttentionParams& p, CudaCall& call) {
  if (p.batch == 0 || p.q_heads == 0 || p.q_length == 0) return;
  const bool tensor_cores =
      p.q_dtype != DType::f32 && p.kv_dtype == p.q_dtype && aligned<bf16_t>(p.q, p.q_strides) &&
      aligned<bf16_t>(p.k, p.k_strides) && aligned<bf16_t>(p.v, p.v_strides) &&
      aligned<bf16_t>(p.out, p.out_strides);
  if (tensor_cores && !p.deterministic && attention_decode_takes(p))
    attention_decode(p, call);
  else if (tensor_cores)
    attention_prefill(p, call);
  else
    attention_any(p, call);
}

}  // namespace gemma2::cuda
