// A kernel that does what it is told: random programs of accesses and barriers, against which the
// emulator's idea of a race is compared with one of its own making (tests/cuda/test_races.py).

#include "cuda/launch.h"

namespace gemma2::cuda {
namespace {

constexpr int kCells = 16;

struct Cells {
  int at[kCells];
};

// program: [steps][threads] of instruction * 256 + argument.
__global__ void interpret(const int* program, int steps) {
  Cells& cells = static_shared<Cells>();
  if (threadIdx.x < kCells) cells.at[threadIdx.x] = 0;
  sync_block();
  for (int s = 0; s < steps; ++s) {
    const int word = load(program + s * blockDim.x + threadIdx.x);
    const int argument = word % 256;
    switch (word / 256) {
      case 1:
        load(&cells.at[argument]);
        break;
      case 2:
        store(&cells.at[argument], s);
        break;
      case 3:
        atomic_add(&cells.at[argument], 1);
        break;
      case 4:
        sync_block();
        break;
      case 5:
        sync_warp();
        break;
      case 6:  // of two warps
        barrier_sync(1 + argument, 64);
        break;
      case 7:
        barrier_arrive(1 + argument, 64);
        break;
    }
  }
}

}  // namespace
}  // namespace gemma2::cuda

extern "C" const char* gemma2_interpret(const int* program, int steps, int threads) {
  using namespace gemma2::cuda;
  gemma2::CudaCall call = {};
  launch(call, "interpret", interpret, 1, threads, 0, program, steps);
  return call.error;
}
