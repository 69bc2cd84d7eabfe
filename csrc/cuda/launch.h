// Launching: from Params with run-time dtypes to a kernel template on a stream.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "cuda/kernels.h"
#include "cuda/ptx.h"

namespace gemma2::cuda {

// Calls f with a value whose `type` is the element type of `dtype`.
template <typename T>
struct Type {
  using type = T;
};
template <typename F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<bf16_t>{});
    case DType::f16:
      return f(Type<f16_t>{});
  }
}

// Working memory on the device for the call's kernels, not initialised.
inline void* allocate(CudaCall& call, int64_t bytes) { return call.allocate(call.owner, bytes); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows that start at `p`, `stride` elements apart, can be read 16 bytes at a time.
template <typename T>
bool rows_of_16_bytes(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

// Runs kernel<<<grid, block, shared_bytes>>>(arguments...) on the call's stream. An empty grid is
// no launch. `name` is what profilers' users and the emulator's reports see.
template <typename... Parameters, typename... Arguments>
void launch(CudaCall& call, const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || call.error != nullptr) return;
  cudaError_t status = cudaSuccess;
  // More than 48 KB a kernel must be allowed, on each device. Each time, since that costs less than
  // knowing where it has been done; it is no work of the stream, so a graph may be captured.
  if (shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
#ifdef GEMMA2_EMULATE
    call.error = emulator::launch(name, grid, block, shared_bytes, kernel,
                                  static_cast<Parameters>(arguments)...);
#else
    (void)name;
    // clang-format off: it takes >>> for three brackets
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(call.stream)>>>(
        static_cast<Parameters>(arguments)...);
    // clang-format on
#endif
  }
  status = cudaGetLastError();  // and forget it: the next launch has nothing to do with it
  if (status != cudaSuccess) call.error = cudaGetErrorString(status);
}

}  // namespace gemma2::cuda
