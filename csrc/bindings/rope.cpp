#include "params/rope.h"

#include <tuple>

#include "bindings/cache_check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

// Dense rows of D/2: a view where the table has them, a copy of this small tensor otherwise.
Tensor table(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_device(op, name, t, "q", q);
  check_dtype(op, name, t, ScalarType::Float);
  const int64_t half = q.size(3) / 2;
  check(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == q.size(0)) && t.size(1) == q.size(2) &&
            t.size(2) == half,
        op, ": ", name, " has shape ", shape_of(t), ", q has shape ", shape_of(q),
        ": [B or 1, S, D/2] is wanted");
  const bool dense_rows = t.stride(2) == 1 && t.stride(1) == half;
  return dense_rows ? t : dense_of(op, name, t);
}

// Checked arguments, with the tensors that the pointers in `params` need alive.
struct RopeArguments {
  RopeParams params;
  Tensor cos, sin, q_out, k_out;
};

RopeArguments rope_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
                             const Tensor& sin, bool keep_k) {
  check_device(op, "q", q);
  check_device(op, "k", k, "q", q);
  check_dim(op, "q", q, 4, "[B, Hq, S, D]");
  check_dim(op, "k", k, 4, "[B, Hkv, S, D]");
  check(q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3), op,
        ": q has shape ", shape_of(q), ", k has shape ", shape_of(k),
        ": batch, length and head_dim must be the same");
  check(q.size(3) % 2 == 0, op, ": head_dim is ", q.size(3), ": an even number is wanted");
  const DType dtype = float_dtype(op, "q", q);
  check_same_dtype(op, "q", q, "k", k);
  check_dense_last(op, "q", q);
  check_dense_last(op, "k", k);

  RopeArguments out;
  out.cos = table(op, "cos", cos, q);
  out.sin = table(op, "sin", sin, q);
  check(out.cos.size(0) == out.sin.size(0), op, ": cos has shape ", shape_of(cos),
        ", sin has shape ", shape_of(sin), ": they must be the same");
  const bool per_row = out.cos.size(0) > 1;
  if (per_row && out.cos.stride(0) != out.sin.stride(0)) {
    out.cos = dense_of(op, "cos", out.cos);
    out.sin = dense_of(op, "sin", out.sin);
  }
  out.q_out = new_result(op, q, q.sizes(), q.scalar_type());
  if (keep_k) out.k_out = new_result(op, k, k.sizes(), k.scalar_type());
  out.params = {
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .cos = static_cast<const float*>(out.cos.const_data_ptr()),
      .sin = static_cast<const float*>(out.sin.const_data_ptr()),
      .q_out = out.q_out.mutable_data_ptr(),
      .k_out = keep_k ? out.k_out.mutable_data_ptr() : nullptr,
      .batch = q.size(0),
      .q_heads = q.size(1),
      .kv_heads = k.size(1),
      .length = q.size(2),
      .head_dim = q.size(3),
      .q_strides = strides3(q),
      .k_strides = strides3(k),
      .q_out_strides = strides3(out.q_out),
      .k_out_strides = keep_k ? strides3(out.k_out) : Strides3{},
      .table_batch_stride = per_row ? out.cos.stride(0) : 0,
      .dtype = dtype,
  };
  return out;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin) {
  const RopeArguments arguments = rope_arguments("rope", q, k, cos, sin, true);
  run("rope", q, [](const auto& kernels) { return kernels.rope; }, arguments.params);
  return {arguments.q_out, arguments.k_out};
}

Tensor rope_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                  const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& q_start, const Tensor& kv_len,
                  const std::optional<Tensor>& k_base) {
  const CacheWriteArguments cache =
      cache_arguments("rope_cache", k_cache, v_cache, k, v, q_start, kv_len, k_base);
  const RopeArguments arguments = rope_arguments("rope_cache", q, k, cos, sin, false);
  check_apart_from_caches("rope_cache", "q", q, k_cache, v_cache);
  check_apart_from_caches("rope_cache", "cos", cos, k_cache, v_cache);
  check_apart_from_caches("rope_cache", "sin", sin, k_cache, v_cache);
  run(
      "rope_cache", q, [](const auto& kernels) { return kernels.rope_cache; }, arguments.params,
      cache.params);
  return arguments.q_out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) {
  m.impl("rope", TORCH_BOX(&gemma2::rope));
  m.impl("rope_cache", TORCH_BOX(&gemma2::rope_cache));
}
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) {
  m.impl("rope", TORCH_BOX(&gemma2::rope));
  m.impl("rope_cache", TORCH_BOX(&gemma2::rope_cache));
}
