#include "params/geglu.h"

#include "bindings/check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

Tensor geglu(const Tensor& gate, const Tensor& up) {
  const char* op = "geglu";
  check_device(op, "gate", gate);
  check_device(op, "up", up, "gate", gate);
  check(gate.dim() >= 1, op, ": gate is a scalar: [.., F] is wanted");
  check(shape_of(gate) == shape_of(up), op, ": gate has shape ", shape_of(gate), ", up has shape ",
        shape_of(up), ": they must be the same");
  const DType dtype = float_dtype(op, "gate", gate);
  check_same_dtype(op, "gate", gate, "up", up);

  const Rows gate_rows = as_rows(op, "gate", gate), up_rows = as_rows(op, "up", up);
  Tensor out = new_result(op, gate, gate.sizes(), gate.scalar_type());
  const GegluParams params = {
      .gate = gate_rows.tensor.const_data_ptr(),
      .up = up_rows.tensor.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .rows = gate_rows.rows,
      .width = gate.size(gate.dim() - 1),
      .gate_stride = gate_rows.stride,
      .up_stride = up_rows.stride,
      .dtype = dtype,
  };
  run(op, gate, [](const auto& kernels) { return kernels.geglu; }, params);
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("geglu", TORCH_BOX(&gemma2::geglu)); }
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) { m.impl("geglu", TORCH_BOX(&gemma2::geglu)); }
