#include "params/attention.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "bindings/check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

constexpr const char* kOp = "attention";

// An index tensor: int64, on q's device, of the wanted shape; made dense where it is not (it is
// small).
Tensor indices(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
               const char* layout, const Tensor& q) {
  check_device(kOp, name, t, "q", q);
  check_dtype(kOp, name, t, ScalarType::Long);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == shape.begin()[i];
  if (!fits) {
    std::ostringstream wanted;
    for (int64_t n : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << n;
    check(false, kOp, ": ", name, " has shape ", shape_of(t), ": ", layout, " = [", wanted.str(),
          "] is wanted");
  }
  const Tensor dense = dense_of(kOp, name, t);
  check_positions(kOp, name, dense);
  return dense;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& q_start, const Tensor& kv_len,
                                     const std::optional<Tensor>& kv_start,
                                     const std::optional<Tensor>& k_base,
                                     const std::optional<Tensor>& k_scale,
                                     const std::optional<Tensor>& v_scale, double scale,
                                     double softcap, int64_t window, bool deterministic) {
  check_device(kOp, "q", q);
  check_device(kOp, "k", k, "q", q);
  check_device(kOp, "v", v, "q", q);
  check_dim(kOp, "q", q, 4, "[B, Hq, Sq, D]");
  check_dim(kOp, "k", k, 4, "[B, Hkv, C, D]");
  check_dim(kOp, "v", v, 4, "[B, Hkv, C, D]");
  const int64_t batch = q.size(0), q_heads = q.size(1), q_length = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(1), capacity = k.size(2);
  check(shape_of(k) == shape_of(v), kOp, ": k has shape ", shape_of(k), ", v has shape ",
        shape_of(v), ": they must be the same");
  check(k.size(0) == batch, kOp, ": k has a batch of ", k.size(0), ", q one of ", batch,
        ": they must be the same");
  check(k.size(3) == head_dim, kOp, ": k has head_dim ", k.size(3), ", q has ", head_dim,
        ": they must be the same");
  check(kv_heads > 0 && q_heads % kv_heads == 0, kOp, ": k has ", kv_heads, " heads, q has ",
        q_heads,
        ": the number of query heads must be a multiple of the number of "
        "key/value heads");
  check(!k_scale.has_value(), kOp, ": k_scale is given: int8 caches are not supported yet");
  check(!v_scale.has_value(), kOp, ": v_scale is given: int8 caches are not supported yet");
  const DType q_dtype = float_dtype(kOp, "q", q);
  const DType kv_dtype = float_dtype(kOp, "k", k);
  check_same_dtype(kOp, "k", k, "v", v);
  check(head_dim == 64 || head_dim == 128 || head_dim == 256, kOp, ": head_dim is ", head_dim,
        ": the kernel takes 64, 128 and 256 (gemma2.ops.attention sends others "
        "to the reference)");
  check_dense_last(kOp, "q", q);
  check_dense_last(kOp, "k", k);
  check_dense_last(kOp, "v", v);
  check(is_finite_float(scale), kOp, ": scale is ", scale, ": a finite float32 number is wanted");
  check(softcap == 0 || is_positive_float(softcap), kOp, ": softcap is ", softcap,
        ": a positive finite float32 number is wanted, or 0 for none");
  check(window >= 0 && window <= kFarthest, kOp, ": window is ", window,
        ": a positive number up to 2^62 is wanted, or 0 for none");
  const Tensor starts = indices("q_start", q_start, {batch}, "[B]", q);
  const Tensor lengths = indices("kv_len", kv_len, {batch}, "[B]", q);
  std::optional<Tensor> documents, bases;
  if (kv_start) documents = indices("kv_start", *kv_start, {batch, q_length}, "[B, Sq]", q);
  if (k_base) bases = indices("k_base", *k_base, {batch}, "[B]", q);

  // Laid out as [B, Sq, Hq, D], so that the output projection reads it without
  // a copy.
  Tensor storage = new_result(kOp, q, {batch, q_length, q_heads, head_dim}, q.scalar_type());
  Tensor out = torch::stable::transpose(storage, 1, 2);
  Tensor lse = new_result(kOp, q, {batch, q_heads, q_length}, ScalarType::Float);
  const AttentionParams params = {
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .lse = static_cast<float*>(lse.mutable_data_ptr()),
      .q_start = static_cast<const int64_t*>(starts.const_data_ptr()),
      .kv_len = static_cast<const int64_t*>(lengths.const_data_ptr()),
      .kv_start = documents ? static_cast<const int64_t*>(documents->const_data_ptr()) : nullptr,
      .k_base = bases ? static_cast<const int64_t*>(bases->const_data_ptr()) : nullptr,
      .batch = batch,
      .q_heads = q_heads,
      .kv_heads = kv_heads,
      .q_length = q_length,
      .capacity = capacity,
      .head_dim = head_dim,
      .q_strides = strides3(q),
      .k_strides = strides3(k),
      .v_strides = strides3(v),
      .out_strides = strides3(out),
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
      .window = window,
      .deterministic = deterministic,
      .q_dtype = q_dtype,
      .kv_dtype = kv_dtype,
  };
  run(kOp, q, [](const auto& kernels) { return kernels.attention; }, params);
  return {out, lse};
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("attention", TORCH_BOX(&gemma2::attention)); }
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) { m.impl("attention", TORCH_BOX(&gemma2::attention)); }
