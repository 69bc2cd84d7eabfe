#pragma once

#include "common/dtype.h"

namespace gemma2 {

// out[t, :] = weight[ids[t], :] * scale, with scale already rounded to the weight's dtype.
struct EmbedParams {
  const int64_t* ids;                           // [tokens], every one in [0, rows of the table)
  const void* weight;                           // [V, hidden], rows `weight_stride` elements apart
  void* out;                                    // [tokens, hidden], dense
  int64_t tokens, hidden, rows, weight_stride;  // rows: V
  float scale;
  DType weight_dtype, out_dtype;
};

}  // namespace gemma2
