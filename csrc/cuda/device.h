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

}  // namespace gemma2::cuda
