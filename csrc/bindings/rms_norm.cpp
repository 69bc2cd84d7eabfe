#include "params/rms_norm.h"

#include <tuple>

#include "bindings/check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

void check_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x) {
  check_device(op, name, weight, "x", x);
  check(weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), op, ": ", name, " has shape ",
        shape_of(weight), ", x has shape ", shape_of(x), ": one weight per element of x's last ",
        "dimension is wanted");
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const char* op = "rms_norm";
  check_device(op, "x", x);
  check(x.dim() >= 1, op, ": x is a scalar: [.., H] is wanted");
  check_weight(op, "weight", weight, x);
  const DType x_dtype = float_dtype(op, "x", x);
  const DType weight_dtype = float_dtype(op, "weight", weight);

  const Rows rows = as_rows(op, "x", x);
  const Tensor dense_weight = dense_of(op, "weight", weight);
  Tensor out = new_result(op, x, x.sizes(), weight.scalar_type());
  const RmsNormParams params = {
      .x = rows.tensor.const_data_ptr(),
      .weight = dense_weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .rows = rows.rows,
      .hidden = x.size(x.dim() - 1),
      .x_stride = rows.stride,
      .eps = static_cast<float>(eps),
      .x_dtype = x_dtype,
      .weight_dtype = weight_dtype,
  };
  run(op, x, [](const auto& kernels) { return kernels.rms_norm; }, params);
  return out;
}

Tensor run_add_rms_norm(const char* op, const Tensor& residual, const Tensor& x, const Tensor& post,
                        const Tensor& pre, double eps, bool in_place, Tensor& residual_out) {
  check_device(op, "x", x);
  check_device(op, "residual", residual, "x", x);
  check(x.dim() >= 1, op, ": x is a scalar: [.., H] is wanted");
  check(shape_of(residual) == shape_of(x), op, ": residual has shape ", shape_of(residual),
        ", x has shape ", shape_of(x), ": they must be the same");
  check_weight(op, "post_weight", post, x);
  check_weight(op, "pre_weight", pre, x);
  const DType residual_dtype = float_dtype(op, "residual", residual);
  const DType x_dtype = float_dtype(op, "x", x);
  const DType weight_dtype = float_dtype(op, "post_weight", post);
  check_same_dtype(op, "post_weight", post, "pre_weight", pre);
  if (in_place) {
    check_contiguous(op, "residual", residual);
    check_apart(op, "residual", residual, "x", x);
    check_apart(op, "residual", residual, "post_weight", post);
    check_apart(op, "residual", residual, "pre_weight", pre);
  }

  const Tensor dense_residual = dense_of(op, "residual", residual);
  const Rows rows = as_rows(op, "x", x);
  const Tensor dense_post = dense_of(op, "post_weight", post);
  const Tensor dense_pre = dense_of(op, "pre_weight", pre);
  residual_out =
      in_place ? residual : new_result(op, residual, residual.sizes(), residual.scalar_type());
  Tensor y = new_result(op, x, x.sizes(), post.scalar_type());
  const AddRmsNormParams params = {
      .residual = dense_residual.const_data_ptr(),
      .x = rows.tensor.const_data_ptr(),
      .post_weight = dense_post.const_data_ptr(),
      .pre_weight = dense_pre.const_data_ptr(),
      .residual_out = residual_out.mutable_data_ptr(),
      .y = y.mutable_data_ptr(),
      .rows = rows.rows,
      .hidden = x.size(x.dim() - 1),
      .x_stride = rows.stride,
      .eps = static_cast<float>(eps),
      .residual_dtype = residual_dtype,
      .x_dtype = x_dtype,
      .weight_dtype = weight_dtype,
  };
  run(op, x, [](const auto& kernels) { return kernels.add_rms_norm; }, params);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& post,
                                        const Tensor& pre, double eps) {
  Tensor residual_out;
  Tensor y = run_add_rms_norm("add_rms_norm", residual, x, post, pre, eps, false, residual_out);
  return {residual_out, y};
}

Tensor add_rms_norm_(const Tensor& residual, const Tensor& x, const Tensor& post, const Tensor& pre,
                     double eps) {
  Tensor residual_out;
  return run_add_rms_norm("add_rms_norm_", residual, x, post, pre, eps, true, residual_out);
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&gemma2::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&gemma2::add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&gemma2::add_rms_norm_));
}
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&gemma2::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&gemma2::add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&gemma2::add_rms_norm_));
}
