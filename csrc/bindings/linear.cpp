#include "params/linear.h"

#include <vector>

#include "bindings/check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight) {
  const char* op = "linear";
  check_device(op, "x", x);
  check_device(op, "weight", weight, "x", x);
  check(x.dim() >= 1, op, ": x is a scalar: [.., K] is wanted");
  check_dim(op, "weight", weight, 2, "[N, K]");
  check(weight.size(1) == x.size(x.dim() - 1), op, ": weight has shape ", shape_of(weight),
        ", x has shape ", shape_of(x), ": their last dimensions must be the same");
  const DType dtype = float_dtype(op, "x", x);
  float_dtype(op, "weight", weight);
  check_same_dtype(op, "x", x, "weight", weight);
  check_dense_last(op, "weight", weight);

  const Rows rows = as_rows(op, "x", x);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(weight.size(0));
  Tensor out = new_result(op, x, shape, x.scalar_type());
  const LinearParams params = {
      .x = rows.tensor.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .m = rows.rows,
      .n = weight.size(0),
      .k = weight.size(1),
      .x_stride = rows.stride,
      .weight_stride = weight.stride(0),
      .dtype = dtype,
  };
  run(op, x, [](const auto& kernels) { return kernels.linear; }, params);
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("linear", TORCH_BOX(&gemma2::linear)); }
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) { m.impl("linear", TORCH_BOX(&gemma2::linear)); }
