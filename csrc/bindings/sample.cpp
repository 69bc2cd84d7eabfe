#include "params/sample.h"

#include <cmath>

#include "bindings/check.h"
#include "bindings/device.h"

namespace gemma2 {
namespace {

constexpr const char* kOp = "sample";

// The history as dense [B, L], with every entry below V; null Tensor when there is none.
Tensor checked_history(const Tensor& history, const Tensor& logits) {
  check_device(kOp, "history", history, "logits", logits);
  check_dtype(kOp, "history", history, ScalarType::Long);
  check(history.dim() == 2 && history.size(0) == logits.size(0), kOp, ": history has shape ",
        shape_of(history), ", logits has shape ", shape_of(logits), ": [B, L] is wanted");
  const Tensor dense = dense_of(kOp, "history", history);
  const int64_t* tokens = static_cast<const int64_t*>(dense.const_data_ptr());
  // On CUDA the kernel stops at such a token: to look at them here, the host would have to wait.
  for (int64_t i = 0; logits.is_cpu() && i < dense.numel(); ++i)
    check(tokens[i] < logits.size(1), kOp, ": history holds ", tokens[i], ", logits has shape ",
          shape_of(logits), ": tokens below ", logits.size(1), " are wanted, or -1 for none");
  return dense;
}

Tensor sample(const Tensor& logits, const std::optional<Tensor>& history, int64_t seed,
              const Tensor& step, double temperature, int64_t top_k, double top_p, double min_p,
              double repetition_penalty) {
  check_device(kOp, "logits", logits);
  check_dim(kOp, "logits", logits, 2, "[B, V]");
  const DType dtype = float_dtype(kOp, "logits", logits);
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  check(vocab > 0 && vocab <= INT32_MAX, kOp, ": logits has shape ", shape_of(logits),
        ": [B, V] with 1 <= V < 2^31 is wanted");
  check_device(kOp, "step", step, "logits", logits);
  check_dtype(kOp, "step", step, ScalarType::Long);
  check(step.dim() == 0 || (step.dim() == 1 && step.size(0) == batch), kOp, ": step has shape ",
        shape_of(step), ": a scalar is wanted, or [B] = [", batch, "]");
  check(is_finite_float(temperature) && temperature >= 0, kOp, ": temperature is ", temperature,
        ": a number >= 0 is wanted (0 is greedy)");
  check(temperature == 0 || temperature >= 1e-30, kOp, ": temperature is ", temperature,
        ": too small for float32; 0 is greedy");
  check(top_k >= 0, kOp, ": top_k is ", top_k, ": a number >= 0 is wanted (0 keeps all)");
  check(top_p > 0 && top_p <= 1, kOp, ": top_p is ", top_p, ": 0 < top_p <= 1 is wanted");
  check(min_p >= 0 && min_p <= 1, kOp, ": min_p is ", min_p, ": 0 <= min_p <= 1 is wanted");
  check(is_positive_float(repetition_penalty), kOp, ": repetition_penalty is ", repetition_penalty,
        ": a positive finite float32 number is wanted");
  Tensor tokens;
  if (history) tokens = checked_history(*history, logits);

  const Rows rows = as_rows(kOp, "logits", logits);
  Tensor out = new_result(kOp, logits, {batch}, ScalarType::Long);
  int64_t* chosen = static_cast<int64_t*>(out.mutable_data_ptr());
  const SampleParams params = {
      .logits = rows.tensor.const_data_ptr(),
      .history = history ? static_cast<const int64_t*>(tokens.const_data_ptr()) : nullptr,
      .step = static_cast<const int64_t*>(step.const_data_ptr()),
      .out = chosen,
      .batch = batch,
      .vocab = vocab,
      .logits_stride = rows.stride,
      .history_length = history ? tokens.size(1) : 0,
      .step_stride = step.dim() == 0 ? 0 : step.stride(0),
      .seed = static_cast<uint64_t>(seed),
      .temperature = static_cast<float>(temperature),
      .repetition_penalty = static_cast<float>(repetition_penalty),
      .top_p = top_p,
      .min_p = min_p,
      .top_k = top_k,
      .dtype = dtype,
  };
  run(kOp, logits, [](const auto& kernels) { return kernels.sample; }, params);
  // On CUDA these numbers stay in the result, for whoever reads it back anyway.
  for (int64_t r = 0; logits.is_cpu() && r < batch; ++r) {
    check(chosen[r] != kSampleNotFinite, kOp, ": row ", r,
          " of logits has NaN or +infinity, or overflows when divided by the temperature ",
          temperature, ": numbers below infinity are wanted");
    check(chosen[r] != kSampleEmpty, kOp, ": row ", r,
          " of logits is -infinity everywhere: no token can be drawn");
  }
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("sample", TORCH_BOX(&gemma2::sample)); }
STABLE_TORCH_LIBRARY_IMPL(gemma2, CUDA, m) { m.impl("sample", TORCH_BOX(&gemma2::sample)); }
