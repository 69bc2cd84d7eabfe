// What the host asks the CUDA runtime: the device's sizes, and what a kernel may have.

#include "cuda/emulator/host.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "cuda/emulator/runtime.h"

namespace {

cudaError_t last_error = cudaSuccess;

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int from_environment(const char* name, int usual) {
  const char* value = getenv(name);
  return value == nullptr ? usual : atoi(value);
}

constexpr int kReserved = 1024;  // of a multiprocessor's shared memory, for each block
int shared_of_multiprocessor() { return from_environment("GEMMA2_EMULATED_SHARED_KB", 228) * 1024; }

std::map<const void*, int>& allowed() {
  static std::map<const void*, int> bytes;
  return bytes;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return noted(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = from_environment("GEMMA2_EMULATED_MULTIPROCESSORS", 132);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_of_multiprocessor();
      return cudaSuccess;
  }
  return noted(cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

namespace gemma2::emulator {

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > shared_of_block())
    return noted(cudaErrorInvalidValue);
  allowed()[kernel] = value;
  return cudaSuccess;
}

size_t shared_of_block() {
  return std::min<size_t>(shared_of_multiprocessor() - kReserved, kSharedBytes);
}

size_t dynamic_shared_allowed(const void* kernel) {
  const auto found = allowed().find(kernel);
  return found == allowed().end() ? kSharedUnasked : found->second;
}

uint64_t launch_bound(const void* kernel) {
  const auto* code = static_cast<const unsigned char*>(kernel);
#if defined(__x86_64__)
  constexpr unsigned char kNoOp[] = {0x90}, kLanding[] = {0xf3, 0x0f, 0x1e, 0xfa};  // endbr64
#elif defined(__aarch64__)
  constexpr unsigned char kNoOp[] = {0x1f, 0x20, 0x03, 0xd5}, kLanding[] = {0x5f, 0x24, 0x03, 0xd5};
#else
#error "what is a no-op here?"
#endif
  if (memcmp(code, kLanding, sizeof kLanding) == 0) code += sizeof kLanding;
  uint64_t warps = 0;
  for (; memcmp(code, kNoOp, sizeof kNoOp) == 0; code += sizeof kNoOp) ++warps;
  return warps * kWarpSize;
}

}  // namespace gemma2::emulator
