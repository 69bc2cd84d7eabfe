#include "params/embed.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "bindings/check.h"
#include "bindings/device.h"
#include "common/mutate.h"

namespace gemma2 {
namespace {

// sqrt(hidden) as the weight's dtype holds it: part of the model (59.87 is 59.75 in bfloat16).
float rounded_to(DType dtype, double scale) {
  const float exact = static_cast<float>(scale);
  if (mutated(Mutation::embed_unrounded)) return exact;
  switch (dtype) {
    case DType::f32:
      break;
    case DType::bf16:
      return static_cast<float>(c10::BFloat16(exact));
    case DType::f16:
      return static_cast<float>(c10::Half(exact));
  }
  return exact;
}

Tensor embed(const Tensor& ids, const Tensor& weight, double scale) {
  const char* op = "embed";
  check_device(op, "weight", weight);
  check_device(op, "ids", ids, "weight", weight);
  check_dtype(op, "ids", ids, ScalarType::Long);
  check_dim(op, "weight", weight, 2, "[V, H]");
  const DType dtype = float_dtype(op, "weight", weight);
  check_dense_last(op, "weight", weight);
  check(is_finite_float(scale), op, ": scale is ", scale, ": a finite float32 number is wanted");

  const Tensor dense = dense_of(op, "ids", ids);
  const int64_t* values = static_cast<const int64_t*>(dense.const_data_ptr());
  const int64_t tokens = dense.numel(), rows = weight.size(0), hidden = weight.size(1);
  // On CUDA the kernel stops at such an id: to look at them here, the host would have to wait.
  for (int64_t t = 0; ids.is_cpu() && t < tokens; ++t)
    check(values[t] >= 0 && values[t] < rows, op, ": ids holds ", values[t], " (element ", t,
          "): the table has ", rows, " rows, 0 <= id < ", rows, " is wanted");

  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(hidden);
  const bool narrow = dtype == DType::bf16;
  Tensor out = new_result(op, weight, shape, narrow ? ScalarType::BFloat16 : ScalarType::Float);
  const EmbedParams params = {
      .ids = values,
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .tokens = tokens,
      .hidden = hidden,
      .rows = rows,
      .weight_stride = weight.stride(0),
      .scale = rounded_to(dtype, scale),
      .weight_dtype = dtype,
      .out_dtype = narrow ? DType::bf16 : DType::f32,
  };
  run(op, weight, [](const auto& kernels) { return kernels.embed; }, params);
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("embed", TORCH_BOX(&gemma2::embed)); }
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) { m.impl("embed", TORCH_BOX(&gemma2::embed)); }
