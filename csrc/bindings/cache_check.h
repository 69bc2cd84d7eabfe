// The checks that cache_write and rope_cache share; fills everything of their common Params.
#pragma once

#include "bindings/check.h"
#include "params/cache_write.h"

namespace gemma2 {

// Checked arguments, with the dense copies of index tensors that the pointers in `params` need
// alive.
struct CacheWriteArguments {
  CacheWriteParams params;
  Tensor q_start, kv_len, k_base;
};

inline Tensor row_indices(const char* op, const char* name, const Tensor& t, const Tensor& k) {
  const int64_t batch = k.size(0);
  check_device(op, name, t, "k", k);
  check_dtype(op, name, t, ScalarType::Long);
  check(t.dim() == 1 && t.size(0) == batch, op, ": ", name, " has shape ", shape_of(t), ": [B] = [",
        batch, "] is wanted");
  const Tensor dense = dense_of(op, name, t);
  check_positions(op, name, dense);
  return dense;
}

inline void check_cache(const char* op, const char* name, const Tensor& cache, const Tensor& k) {
  check_device(op, name, cache, "k", k);
  check_dim(op, name, cache, 4, "[B, Hkv, C, D]");
  check(cache.size(0) == k.size(0) && cache.size(1) == k.size(1) && cache.size(3) == k.size(3), op,
        ": ", name, " has shape ", shape_of(cache), ", k has shape ", shape_of(k),
        ": batch, heads and head_dim must be the same");
  check_dense_last(op, name, cache);
  for (int64_t i = 0; i < 3; ++i)
    check(cache.stride(i) != 0 || cache.size(i) <= 1, op, ": ", name, " is expanded in dimension ",
          i, ": memory of its own for every element is wanted");
}

inline void check_apart_from_caches(const char* op, const char* name, const Tensor& t,
                                    const Tensor& k_cache, const Tensor& v_cache) {
  check_apart(op, "k_cache", k_cache, name, t);
  check_apart(op, "v_cache", v_cache, name, t);
}

inline CacheWriteArguments cache_arguments(const char* op, const Tensor& k_cache,
                                           const Tensor& v_cache, const Tensor& k, const Tensor& v,
                                           const Tensor& q_start, const Tensor& kv_len,
                                           const std::optional<Tensor>& k_base) {
  check_device(op, "k", k);
  check_device(op, "v", v, "k", k);
  check_dim(op, "k", k, 4, "[B, Hkv, S, D]");
  check(shape_of(k) == shape_of(v), op, ": k has shape ", shape_of(k), ", v has shape ",
        shape_of(v), ": they must be the same");
  const DType dtype = float_dtype(op, "k", k);
  check_same_dtype(op, "k", k, "v", v);
  check_dense_last(op, "k", k);
  check_dense_last(op, "v", v);
  check_cache(op, "k_cache", k_cache, k);
  check_cache(op, "v_cache", v_cache, k);
  check(k_cache.size(2) == v_cache.size(2), op, ": k_cache has ", k_cache.size(2),
        " slots, v_cache has ", v_cache.size(2), ": they must be the same");
  const DType cache_dtype = float_dtype(op, "k_cache", k_cache);
  check_same_dtype(op, "k_cache", k_cache, "v_cache", v_cache);
  check(k_cache.numel() == 0 || k_cache.const_data_ptr() != v_cache.const_data_ptr(), op,
        ": k_cache and v_cache begin at the same memory: one for each is wanted");
  check_apart_from_caches(op, "k", k, k_cache, v_cache);
  check_apart_from_caches(op, "v", v, k_cache, v_cache);

  CacheWriteArguments out;
  out.q_start = row_indices(op, "q_start", q_start, k);
  out.kv_len = row_indices(op, "kv_len", kv_len, k);
  if (k_base) out.k_base = row_indices(op, "k_base", *k_base, k);
  out.params = {
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .k_cache = k_cache.mutable_data_ptr(),
      .v_cache = v_cache.mutable_data_ptr(),
      .q_start = static_cast<const int64_t*>(out.q_start.const_data_ptr()),
      .kv_len = static_cast<const int64_t*>(out.kv_len.const_data_ptr()),
      .k_base = k_base ? static_cast<const int64_t*>(out.k_base.const_data_ptr()) : nullptr,
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
  return out;
}

}  // namespace gemma2
