#include "params/embed.h"

#include <vector>

#include "bindings/check.h"
#include "common/mutate.h"
#include "cpu/kernels.h"

namespace gemma2 {
namespace {

// To the nearest bfloat16 or float16, ties to even: what a tensor of one element would hold.
float round_to(DType dtype, double value) {
  if (dtype == DType::f32 || mutated(Mutation::embed_unrounded)) return static_cast<float>(value);
  const float x = static_cast<float>(value);
  return dtype == DType::bf16 ? static_cast<float>(torch::headeronly::BFloat16(x))
                              : static_cast<float>(torch::headeronly::Half(x));
}

Tensor embed(const Tensor& ids, const Tensor& weight, double scale) {
  const char* op = "embed";
  check_cpu(op, "ids", ids);
  check_cpu(op, "weight", weight);
  check_dtype(op, "ids", ids, ScalarType::Long);
  check_dim(op, "weight", weight, 2, "[V, H]");
  check_dense_last(op, "weight", weight);
  const DType dtype = float_dtype(op, "weight", weight);
  const Tensor dense = torch::stable::contiguous(ids);
  const int64_t* id = static_cast<const int64_t*>(dense.const_data_ptr());
  const int64_t tokens = dense.numel(), vocabulary = weight.size(0);
  for (int64_t i = 0; i < tokens; ++i)
    check(id[i] >= 0 && id[i] < vocabulary, op, ": ids has ", id[i], " at flat index ", i,
          ": the table has rows 0 to ", vocabulary - 1);

  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(weight.size(1));
  const bool narrow = dtype == DType::bf16;
  Tensor out = torch::stable::new_empty(
      weight, shape, narrow ? ScalarType::BFloat16 : ScalarType::Float);
  cpu_kernels().embed({
      .ids = id,
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .tokens = tokens,
      .hidden = weight.size(1),
      .weight_stride = weight.stride(0),
      .scale = round_to(dtype, scale),
      .weight_dtype = dtype,
      .out_dtype = narrow ? DType::bf16 : DType::f32,
  });
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("embed", TORCH_BOX(&gemma2::embed)); }
