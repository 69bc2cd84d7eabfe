// Checks and parameters that cache_write and rope_cache share.
#pragma once

#include "bindings/check.h"
#include "params/cache_write.h"

namespace gemma2 {

inline void check_positions(const char* op, const char* name, const Tensor& t, int64_t batch) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, ScalarType::Long);
  check(t.dim() == 1 && t.size(0) == batch, op, ": ", name, " has shape ", shape_of(t), ": [",
        batch, "] is wanted, one for each row of k");
  check_contiguous(op, name, t);
}

inline CacheWriteParams cache_params(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& k, const Tensor& v, const Tensor& q_start,
                                     const Tensor& kv_len, const std::optional<Tensor>& k_base) {
  const char* names[] = {"k_cache", "v_cache", "k", "v"};
  const Tensor* tensors[] = {&k_cache, &v_cache, &k, &v};
  for (int i = 0; i < 4; ++i) {
    check_cpu(op, names[i], *tensors[i]);
    check_dim(op, names[i], *tensors[i], 4, i < 2 ? "[B, Hkv, C, D]" : "[B, Hkv, S, D]");
    check_dense_last(op, names[i], *tensors[i]);
  }
  const DType dtype = float_dtype(op, "k", k), cache_dtype = float_dtype(op, "k_cache", k_cache);
  check_same_dtype(op, "k", k, "v", v);
  check_same_dtype(op, "k_cache", k_cache, "v_cache", v_cache);
  check(shape_of(k) == shape_of(v), op, ": k has shape ", shape_of(k), ", v has shape ",
        shape_of(v), ": they must be the same");
  check(shape_of(k_cache) == shape_of(v_cache), op, ": k_cache has shape ", shape_of(k_cache),
        ", v_cache has shape ", shape_of(v_cache), ": they must be the same");
  check(k_cache.size(0) == k.size(0) && k_cache.size(1) == k.size(1) && k_cache.size(3) == k.size(3),
        op, ": k_cache has shape ", shape_of(k_cache), ", k has shape ", shape_of(k),
        ": batch, heads and head_dim must be the same");
  check(k_cache.size(2) > 0, op, ": k_cache has no slots");
  check_positions(op, "q_start", q_start, k.size(0));
  check_positions(op, "kv_len", kv_len, k.size(0));
  if (k_base) check_positions(op, "k_base", *k_base, k.size(0));
  return {
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .k_cache = k_cache.mutable_data_ptr(),
      .v_cache = v_cache.mutable_data_ptr(),
      .q_start = static_cast<const int64_t*>(q_start.const_data_ptr()),
      .kv_len = static_cast<const int64_t*>(kv_len.const_data_ptr()),
      .k_base = k_base ? static_cast<const int64_t*>(k_base->const_data_ptr()) : nullptr,
      .batch = k.size(0),
      .kv_heads = k.size(1),
      .length = k.size(2),
      .head_dim = k.size(3),
      .capacity = k_cache.size(2),
      .k_strides = strides3(k),
      .v_strides = strides3(v),
      .k_cache_strides = strides3(k_cache),
      .v_cache_strides = strides3(v_cache),
      .dtype = dtype,
      .cache_dtype = cache_dtype,
  };
}

}  // namespace gemma2
