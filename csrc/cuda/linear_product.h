// What both kernels of linear for 16-bit numbers have in common: the order in which they sum. It is
// the same for any number of rows, and so are a row's bits.
//
// K is cut into segments of 256. A segment is one chain of tensor-core products, 16 k each, by
// rising k; segments are added in order, in float32. What lies beyond K counts as zeros, which add
// nothing. Weights are operand A and rows of x operand B everywhere, so that what the hardware does
// inside of an instruction is the same, too.
#pragma once

#include "cuda/attention_tile.h"

namespace gemma2::cuda {

constexpr int kStep = 16;      // k of an instruction
constexpr int kSegment = 256;  // k of a chain
constexpr int kStage = 64;     // k of a tile in shared memory, as attention_tile.h lays it out

}  // namespace gemma2::cuda
