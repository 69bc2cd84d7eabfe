#pragma once

#include "common/dtype.h"

namespace gemma2 {

// One token per row of capped logits: repetition penalty, temperature, top-k, top-p, min-p, then
// the Gumbel-max draw with the integers of common/philox.h. temperature 0: the first largest logit.
struct SampleParams {
  const void* logits;  // [batch, vocab], rows `logits_stride` elements apart, vocab < 2^31
  const int64_t*
      history;  // [batch, history_length] dense, entries < vocab, those < 0 are ignored; or null
  const int64_t* step;  // of row r at r step_stride; the stride is 0 if all rows share one
  int64_t* out;         // [batch]: a token, or one of the numbers below
  int64_t batch, vocab, logits_stride, history_length, step_stride;
  uint64_t seed;
  float temperature, repetition_penalty;
  double top_p, min_p;
  int64_t top_k;  // 0: all
  DType dtype;
};

// What `out` holds for a row that has no token.
constexpr int64_t kSampleNotFinite = -1;  // a score is NaN or +infinity
constexpr int64_t kSampleEmpty = -2;      // every score is -infinity

}  // namespace gemma2
