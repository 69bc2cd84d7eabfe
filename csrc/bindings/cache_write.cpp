#include "params/cache_write.h"

#include "bindings/cache_check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

void cache_write(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 const Tensor& q_start, const Tensor& kv_len, const std::optional<Tensor>& k_base) {
  const CacheWriteArguments arguments =
      cache_arguments("cache_write", k_cache, v_cache, k, v, q_start, kv_len, k_base);
  run("cache_write", k, [](const auto& kernels) { return kernels.cache_write; }, arguments.params);
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) {
  m.impl("cache_write", TORCH_BOX(&gemma2::cache_write));
}
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) {
  m.impl("cache_write", TORCH_BOX(&gemma2::cache_write));
}
