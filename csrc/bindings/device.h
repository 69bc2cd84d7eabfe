// From tensors to the kernels of their device: the CPU's table of this processor, or the table that
// the CUDA library (csrc/cuda, a shared object of its own) has given. One binding serves both.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "bindings/check.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace gemma2 {

// CUDA kernels for tensors of a device, or null. For CPU tensors there is one only in tests, which
// run the CUDA kernels on a host in place of the CPU's.
const CudaKernels* cuda_kernels(bool for_cpu_tensors);

// torch's current stream of a device.
void* current_cuda_stream(int32_t device);

// Runs the kernel that `select` takes from a table, for tensors of `like`'s device:
//   run("embed", x, [](const auto& kernels) { return kernels.embed; }, EmbedParams{...})
template <typename Select, typename... Params>
void run(const char* op, const Tensor& like, const Select& select, const Params&... params) {
  const bool on_cpu = like.is_cpu();
  const CudaKernels* kernels = cuda_kernels(on_cpu);
  const auto kernel = kernels == nullptr ? nullptr : select(*kernels);
  if (on_cpu && kernel == nullptr) {
    select(cpu_kernels())(params...);
    return;
  }
  check(kernel != nullptr, op, ": the tensors are on a CUDA device, and ",
        kernels == nullptr ? "no CUDA kernels are loaded (`gemma2 info` says why)"
                           : "there is no CUDA kernel for this operator");
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;
  if (!on_cpu) {
    guard.emplace(like.get_device_index());
    stream = current_cuda_stream(like.get_device_index());
  }
  // torch's allocator knows the stream: what is freed here is used again only after the kernels.
  struct Memory {
    const Tensor& like;
    std::vector<Tensor> pieces;
  } memory = {like, {}};
  const auto allocate = [](void* owner, int64_t bytes) {
    Memory& m = *static_cast<Memory*>(owner);
    m.pieces.push_back(torch::stable::new_empty(m.like, {bytes}, ScalarType::Byte));
    return m.pieces.back().mutable_data_ptr();
  };
  CudaCall call = {stream, allocate, &memory, nullptr};
  kernel(params..., call);
  if (call.error != nullptr) throw std::runtime_error(std::string(op) + ": CUDA: " + call.error);
}

}  // namespace gemma2
