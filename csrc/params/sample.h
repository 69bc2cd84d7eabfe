#pragma once

#include "common/dtype.h"

namespace gemma2 {

// What `out` holds for a row that has no token.
constexpr int64_t kSampleNotFinite = -1;    // NaN or +infinity among the logits
constexpr int64_t kSampleNothingLeft = -2;  // every logit is -infinity

// One token per row of capped logits: repetition penalty, temperature, top-k, top-p, min-p, then the
// Gumbel-max draw with the integers of common/philox.h. temperature 0: the first largest logit.
struct SampleParams {
  const void* logits;      // [batch, vocab], rows `logits_stride` elements apart
  const int64_t* history;  // [batch, history_length] dense, entries < 0 are ignored; or null
  int64_t* out;            // [batch]
  int64_t batch, vocab, logits_stride, history_length;
  uint64_t seed, step;
  float temperature, top_p, min_p, repetition_penalty;
  int64_t top_k;  // 0: all
  DType dtype;
};

}  // namespace gemma2
