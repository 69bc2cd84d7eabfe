// What host code asks the current device, to choose how many blocks it launches.
#pragma once

#include "cuda/ptx.h"

namespace gemma2::cuda {

struct Device {
  int multiprocessors, shared_bytes;  // of shared memory, on each
};

inline Device device() {
  Device d = {1, 0};
  int current = 0;
  cudaGetDevice(&current);
  cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, current);
  cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, current);
  return d;
}

// Blocks that run at a time, if registers let `most` run on a multiprocessor.
inline int64_t resident_blocks(int64_t most, int64_t shared_bytes) {
  constexpr int64_t kReserved = 1024;  // of shared memory, in each block
  const Device d = device();
  const int64_t fit = d.shared_bytes / (shared_bytes + kReserved);
  return d.multiprocessors * (fit < 1 ? 1 : fit < most ? fit : most);
}

}  // namespace gemma2::cuda
