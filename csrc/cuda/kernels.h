// What the CUDA library exports, for the bindings: its table of kernels. Plain C++, no CUDA header.
//
// The library (gemma2/_cuda.so) knows pointers only: no torch, and cudart linked statically, so one
// binary serves every torch. gemma2/ops/_library.py loads it where torch has CUDA and hands its
// table to the operators.
#pragma once

#include "params/kernels.h"

namespace gemma2 {

struct CudaCall {
  void* stream;  // cudaStream_t
  // Gives working memory on the device, aligned to 256 bytes, until the call's kernels have run.
  void* (*allocate)(void* owner, int64_t bytes);
  void* owner;
  const char* error;  // set by a launch that failed; a string that lives forever
};

using CudaKernels = KernelTable<CudaCall&>;

}  // namespace gemma2

// The only symbols that the library exports.
extern "C" const gemma2::CudaKernels* gemma2_cuda_kernels();
// Null if this machine's driver can run the library, else why not.
extern "C" const char* gemma2_cuda_trouble();
