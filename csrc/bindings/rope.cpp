#include "params/rope.h"

#include <tuple>

#include "bindings/cache.h"
#include "bindings/check.h"
#include "cpu/kernels.h"

namespace gemma2 {
namespace {

// k_out and its strides stay empty: rope sets them, rope_cache rotates k into the cache.
RopeParams rope_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
                       const Tensor& sin) {
  const char* names[] = {"q", "k", "cos", "sin"};
  const Tensor* tensors[] = {&q, &k, &cos, &sin};
  for (int i = 0; i < 4; ++i) {
    check_cpu(op, names[i], *tensors[i]);
    check_dim(op, names[i], *tensors[i], i < 2 ? 4 : 3, i < 2 ? "[B, H, S, D]" : "[B or 1, S, D/2]");
  }
  check_dense_last(op, "q", q);
  check_dense_last(op, "k", k);
  const DType dtype = float_dtype(op, "q", q);
  check_same_dtype(op, "q", q, "k", k);
  const int64_t batch = q.size(0), length = q.size(2), head_dim = q.size(3);
  check(k.size(0) == batch && k.size(2) == length && k.size(3) == head_dim, op, ": q has shape ",
        shape_of(q), ", k has shape ", shape_of(k),
        ": batch, length and head_dim must be the same");
  check(head_dim % 2 == 0, op, ": q has head_dim ", head_dim, ": an even number is wanted");
  for (int i = 2; i < 4; ++i) {
    const Tensor& t = *tensors[i];
    check_dtype(op, names[i], t, ScalarType::Float);
    check((t.size(0) == batch || t.size(0) == 1) && t.size(1) == length &&
              t.size(2) == head_dim / 2,
          op, ": ", names[i], " has shape ", shape_of(t), ": [", batch, " or 1, ", length, ", ",
          head_dim / 2, "] is wanted");
    check_contiguous(op, names[i], t);
  }
  check(cos.size(0) == sin.size(0), op, ": cos has shape ", shape_of(cos), ", sin has shape ",
        shape_of(sin), ": they must be the same");
  return {
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .cos = static_cast<const float*>(cos.const_data_ptr()),
      .sin = static_cast<const float*>(sin.const_data_ptr()),
      .q_out = nullptr,
      .k_out = nullptr,
      .batch = batch,
      .q_heads = q.size(1),
      .kv_heads = k.size(1),
      .length = length,
      .head_dim = head_dim,
      .q_strides = strides3(q),
      .k_strides = strides3(k),
      .q_out_strides = {},
      .k_out_strides = {},
      .table_batch_stride = cos.size(0) == 1 ? 0 : length * (head_dim / 2),
      .dtype = dtype,
  };
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin) {
  RopeParams p = rope_params("rope", q, k, cos, sin);
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  Tensor k_out = torch::stable::new_empty(k, k.sizes());
  p.q_out = q_out.mutable_data_ptr();
  p.k_out = k_out.mutable_data_ptr();
  p.q_out_strides = strides3(q_out);
  p.k_out_strides = strides3(k_out);
  cpu_kernels().rope(p);
  return {q_out, k_out};
}

Tensor rope_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                  const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& q_start, const Tensor& kv_len, std::optional<Tensor> k_base) {
  RopeParams p = rope_params("rope_cache", q, k, cos, sin);
  const CacheWriteParams cache =
      cache_params("rope_cache", k_cache, v_cache, k, v, q_start, kv_len, k_base);
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  p.q_out = q_out.mutable_data_ptr();
  p.q_out_strides = strides3(q_out);
  cpu_kernels().rope_cache(p, cache);
  return q_out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) {
  m.impl("rope", TORCH_BOX(&gemma2::rope));
  m.impl("rope_cache", TORCH_BOX(&gemma2::rope_cache));
}
