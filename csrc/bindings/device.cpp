#include "bindings/device.h"

#include <dlfcn.h>

#include <atomic>

namespace gemma2 {
namespace {

std::atomic<const CudaKernels*> for_cuda{nullptr}, for_cpu{nullptr};

}  // namespace

const CudaKernels* cuda_kernels(bool for_cpu_tensors) {
  return (for_cpu_tensors ? for_cpu : for_cuda).load(std::memory_order_acquire);
}

// torch's half for CUDA is not linked, since this library must load without it; where there are
// CUDA tensors, it is in the process.
void* current_cuda_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* found =
        torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(found);
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0)
    throw std::runtime_error("torch does not say which CUDA stream is the current one");
  return stream;
}

}  // namespace gemma2

// Called by gemma2/ops/_library.py with the table of the CUDA library. for_cpu_tensors: by tests.
extern "C" __attribute__((visibility("default"))) void gemma2_install_kernels(
    const gemma2::CudaKernels* kernels, bool for_cpu_tensors) {
  (for_cpu_tensors ? gemma2::for_cpu : gemma2::for_cuda).store(kernels, std::memory_order_release);
}
