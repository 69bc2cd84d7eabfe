// The CUDA runtime's functions that csrc/cuda/launch.h and its like call: the emulated device is an
// H100, or what the environment says:
//   GEMMA2_EMULATED_MULTIPROCESSORS  few, and blocks get long
//   GEMMA2_EMULATED_SHARED_KB        of shared memory on each: 100 on compute capability 8.6
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace gemma2::emulator {

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

// For __launch_bounds__(threads, blocks on a multiprocessor, blocks of a cluster).
constexpr int warps_of_bound(int threads, int = 0, int = 0) { return (threads + 31) / 32; }

}  // namespace gemma2::emulator

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return gemma2::emulator::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute,
                                                  value);
}
