// linear: out[m, n] = sum_k x[m, k] weight[n, k], accumulated in float32, rounded once.
//
// 16-bit numbers: up to 16 rows of x, all aligned to 16 bytes, are linear_few.cu's, which reads the
// weights at the speed of memory. Everything else is linear_tile.cu's, float32 linear_f32.cu's:
// these exist for their order of summation, and cuBLAS is faster. All kernels of a dtype sum in the
// same order, whatever m is (linear_product.h): a row's bits do not depend on the other rows.
//
// Which products come here at all: gemma2/ops/linear.py. Called by csrc/bindings/linear.cpp.

#include "cuda/launch.h"

namespace gemma2::cuda {

bool linear_few_takes(const LinearParams&);
void linear_few(const LinearParams&, CudaCall&);
void linear_tile(const LinearParams&, CudaCall&);
void linear_f32(const LinearParams&, CudaCall&);

void linear(const LinearParams& p, CudaCall& call) {
  if (p.dtype == DType::f32)
    linear_f32(p, call);
  else if (linear_few_takes(p))
    linear_few(p, call);
  else
    linear_tile(p, call);
}

}  // namespace gemma2::cuda
