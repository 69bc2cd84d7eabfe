#include "params/sample.h"

#include "bindings/check.h"
#include "cpu/kernels.h"

namespace gemma2 {
namespace {

Tensor sample(const Tensor& logits, std::optional<Tensor> history, int64_t seed, const Tensor& step,
              double temperature, int64_t top_k, double top_p, double min_p,
              double repetition_penalty) {
  const char* op = "sample";
  check_cpu(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[B, V]");
  const DType dtype = float_dtype(op, "logits", logits);
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  check(vocab > 0, op, ": logits has shape ", shape_of(logits), ": a vocabulary is wanted");
  check_cpu(op, "step", step);
  check_dtype(op, "step", step, ScalarType::Long);
  check(step.numel() == 1, op, ": step has shape ", shape_of(step), ": a scalar is wanted");
  check(temperature >= 0 && temperature <= 1e30, op, ": temperature is ", temperature,
        ": 0 or a positive number is wanted");
  check(top_k >= 0, op, ": top_k is ", top_k, ": 0 (all) or a positive number is wanted");
  check(top_p > 0 && top_p <= 1, op, ": top_p is ", top_p, ": a number in (0, 1] is wanted");
  check(min_p >= 0 && min_p <= 1, op, ": min_p is ", min_p, ": a number in [0, 1] is wanted");
  check(repetition_penalty > 0 && repetition_penalty <= 1e30, op, ": repetition_penalty is ",
        repetition_penalty, ": a positive number is wanted");
  std::optional<Tensor> tokens;
  if (history) {
    check_cpu(op, "history", *history);
    check_dtype(op, "history", *history, ScalarType::Long);
    check(history->dim() == 2 && history->size(0) == batch, op, ": history has shape ",
          shape_of(*history), ": [", batch, ", L] is wanted");
    tokens = torch::stable::contiguous(*history);
    const int64_t* token = static_cast<const int64_t*>(tokens->const_data_ptr());
    for (int64_t i = 0; i < tokens->numel(); ++i)
      check(token[i] < vocab, op, ": history has token ", token[i], ": the vocabulary has ", vocab);
  }

  const Rows rows = as_rows(logits);
  Tensor out = torch::stable::new_empty(logits, {batch}, ScalarType::Long);
  int64_t* chosen = static_cast<int64_t*>(out.mutable_data_ptr());
  cpu_kernels().sample({
      .logits = rows.tensor.const_data_ptr(),
      .history = tokens ? static_cast<const int64_t*>(tokens->const_data_ptr()) : nullptr,
      .out = chosen,
      .batch = batch,
      .vocab = vocab,
      .logits_stride = rows.stride,
      .history_length = tokens ? tokens->size(1) : 0,
      .seed = static_cast<uint64_t>(seed),
      .step = static_cast<uint64_t>(*static_cast<const int64_t*>(step.const_data_ptr())),
      .temperature = static_cast<float>(temperature),
      .top_p = static_cast<float>(top_p),
      .min_p = static_cast<float>(min_p),
      .repetition_penalty = static_cast<float>(repetition_penalty),
      .top_k = top_k,
      .dtype = dtype,
  });
  for (int64_t b = 0; b < batch; ++b) {
    check(chosen[b] != kSampleNotFinite, op, ": logits of row ", b,
          " hold NaN or +infinity: finite ones, or -infinity, are wanted");
    check(chosen[b] != kSampleNothingLeft, op, ": logits of row ", b,
          " are all -infinity: there is no token to take");
  }
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2, CPU, m) { m.impl("sample", TORCH_BOX(&gemma2::sample)); }
