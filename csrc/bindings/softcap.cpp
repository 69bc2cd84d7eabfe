#include "params/softcap.h"

#include <cmath>

#include "bindings/check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

Tensor softcap(const Tensor& x, double cap) {
  check_device("softcap", "x", x);
  const DType dtype = float_dtype("softcap", "x", x);
  check(is_positive_float(cap), "softcap: cap is ", cap,
        ": a positive finite float32 number is wanted");
  const Tensor dense = dense_of("softcap", "x", x);
  Tensor out = new_result("softcap", x, x.sizes(), x.scalar_type());
  const SoftcapParams params = {
      .x = dense.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .n = dense.numel(),
      .cap = static_cast<float>(cap),
      .dtype = dtype,
  };
  run("softcap", x, [](const auto& kernels) { return kernels.softcap; }, params);
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("softcap", TORCH_BOX(&gemma2::softcap)); }
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) { m.impl("softcap", TORCH_BOX(&gemma2::softcap)); }
