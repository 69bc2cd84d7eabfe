// Kernels with a bug planted in each, and the same without it: the emulator must find the bug, name
// its line, and say nothing of the twin (tests/cuda/test_emulator.py). A planted bug shows on
// a line after `// BUG`: of a race on either side's.

#include <string.h>

#include "cuda/launch.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 64;

struct Tile {
  float at[kThreads];
};

// out[t] = x[63 - t], through shared memory.
__global__ void reverse(const float* x, float* out, bool bug) {
  Tile& tile = static_shared<Tile>();
  tile.at[threadIdx.x] = 0.0f;
  sync_block();
  // BUG
  tile.at[threadIdx.x] = load(x + threadIdx.x);
  if (!bug) sync_block();
  // BUG
  store(out + threadIdx.x, tile.at[kThreads - 1 - threadIdx.x]);
}

// The same between two warps, which meet only among themselves.
__global__ void exchange_between_warps(const float* x, float* out, bool bug) {
  Tile& tile = dynamic_shared<Tile>();
  const int warp = threadIdx.x / kWarp;
  if (warp == 0)
    for (int i = threadIdx.x; i < kThreads; i += kWarp) tile.at[i] = load(x + i);
  if (bug)
    sync_warp();
  else
    barrier_sync(3, kThreads);
  if (warp == 1)
    for (int i = threadIdx.x - kWarp; i < kThreads; i += kWarp)
      // BUG
      store(out + i, tile.at[i] + 1.0f);
}

struct Stages {
  alignas(16) float at[3][4 * kThreads];
};

// out = x, by asynchronous copies in three groups of one block's tile each.
__global__ void stream(const float* x, float* out, bool bug) {
  Stages& stages = dynamic_shared<Stages>();
  for (int s = 0; s < 3; ++s) {
    copy_async<16>(&stages.at[s][4 * threadIdx.x], x + s * 4 * kThreads + 4 * threadIdx.x);
    copy_async_commit();
  }
  for (int s = 0; s < 3; ++s) {
    if (s == 0) copy_async_wait<2>();
    if (s == 1) copy_async_wait<1>();
    if (s == 2 && !bug) copy_async_wait<0>();
    sync_block();
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (kThreads - 1 - threadIdx.x) + i;
      // BUG
      store(out + s * 4 * kThreads + at, stages.at[s][at]);
    }
  }
}

// The next tile overwrites the one that others still read.
__global__ void refill_too_early(const float* x, float* out, bool bug) {
  Stages& stages = dynamic_shared<Stages>();
  for (int s = 0; s < 3; ++s) {
    // BUG
    copy_async<16>(&stages.at[0][4 * threadIdx.x], x + s * 4 * kThreads + 4 * threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (kThreads - 1 - threadIdx.x) + i;
      // BUG
      store(out + s * 4 * kThreads + at, stages.at[0][at]);
    }
    if (!bug) sync_block();
  }
}

struct Matrix {
  alignas(16) uint16_t at[16][64];  // rows of 128 bytes: all banks
};

// A 16x64 tile in shared memory, its 16-byte pieces exchanged by row so that a column of pieces
// lies in different banks; piece c of row r stands at c ^ (r & 7). Only the even pieces are filled.
__global__ void swizzled(const uint16_t* x, uint32_t* out, bool bug) {
  Matrix& tile = static_shared<Matrix>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 4; i += kWarp) {
    const int row = i / 4, piece = i % 4 * 2;
    store(reinterpret_cast<uint4*>(&tile.at[row][8 * (piece ^ (row & 7))]),
          load(reinterpret_cast<const uint4*>(x + row * 64 + 8 * piece)));
  }
  sync_warp();
  const int row = lane % 16, piece = lane / 16 * 2;
  uint32_t r[4];
  // BUG
  ldmatrix(r, &tile.at[row][8 * (piece ^ (bug ? 0 : row & 7))]);
  for (int i = 0; i < 4; ++i) store(out + 4 * lane + i, r[i]);
}

// 16x8 = 16x16 times 16x8 in bfloat16, operands row-major in global memory (b: [8][16]).
__global__ void product(const uint16_t* a, const uint16_t* b, float* d, bool bug) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  const auto pair = [](const uint16_t* p) { return load(reinterpret_cast<const uint32_t*>(p)); };
  uint32_t fa[4] = {pair(a + row * 16 + column), pair(a + (row + 8) * 16 + column),
                    pair(a + row * 16 + column + 8), pair(a + (row + 8) * 16 + column + 8)};
  const uint32_t fb[2] = {pair(b + row * 16 + column), pair(b + row * 16 + column + 8)};
  if (bug) {
    // BUG
    const uint32_t swapped = fa[1];
    fa[1] = fa[2];
    fa[2] = swapped;
  }
  float fd[4] = {0, 0, 0, 0};
  mma_16x8x16<bf16_t>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) store(d + (row + i / 2 * 8) * 8 + column + i % 2, fd[i]);
}

__global__ void past_the_tile(const float* x, float* out, bool bug) {
  Tile& tile = static_shared<Tile>();
  tile.at[threadIdx.x] = load(x + threadIdx.x);
  sync_block();
  float sum = 0.0f;
  for (int i = threadIdx.x; bug ? i <= kThreads : i < kThreads; ++i)
    // BUG
    sum += tile.at[i];
  store(out + threadIdx.x, sum);
}

__global__ void past_the_tensor(const float* x, float* out, bool bug) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  // BUG
  const float v = bug || i < 100 ? load(x + i) : 0.0f;
  if (i < 100) store(out + i, v);
}

// A plain pointer, without a wrapper.
__global__ void before_the_tensor(const float* x, float* out, bool bug) {
  const int i = threadIdx.x;
  // BUG
  out[i] = i == 0 && !bug ? 0.0f : x[i - 1];
}

__global__ void never_zeroed(const float* x, float* out, bool bug) {
  Tile& tile = static_shared<Tile>();
  if (!bug) tile.at[threadIdx.x] = 0.0f;
  for (int i = 0; i < 3; ++i)
    // BUG
    tile.at[threadIdx.x] += load(x + threadIdx.x);
  store(out + threadIdx.x, tile.at[threadIdx.x]);
}

// Every block writes its own sum, or all the same one.
__global__ void sum_of_blocks(const float* x, float* out, bool bug) {
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += load(x + blockIdx.x * kThreads + i);
  // BUG
  store(out + (bug ? 0 : blockIdx.x), sum);
}

// Counts by blocks: fine with an atomic.
__global__ void count_of_blocks(int* count, bool bug) {
  if (threadIdx.x != 0) return;
  if (bug)
    // BUG
    store(count, load(count) + 1);
  else
    atomic_add(count, 1);
}

__global__ void misaligned(const float* x, float* out, bool bug) {
  const int i = 4 * threadIdx.x;
  // BUG
  const uint4 v = load(reinterpret_cast<const uint4*>(x + i + (bug ? 1 : 0)));
  store(reinterpret_cast<uint4*>(out + i), v);
}

__global__ void shuffle_inactive(const float* x, float* out, bool bug) {
  const float v = load(x + threadIdx.x);
  if (threadIdx.x >= 16) {
    store(out + threadIdx.x, v);
    return;
  }
  // BUG
  store(out + threadIdx.x, shuffle(v, bug ? 20 : 5, 0xffffu));
}

__global__ void shuffle_after_the_end(const float* x, float* out, bool bug) {
  const float v = load(x + threadIdx.x);
  store(out + threadIdx.x, v);
  if (bug && threadIdx.x == 7) return;
  // BUG
  store(out + threadIdx.x, shuffle_xor(v, 1));
}

__global__ void barrier_in_a_branch(const float* x, float* out, bool bug) {
  Tile& tile = static_shared<Tile>();
  tile.at[threadIdx.x] = load(x + threadIdx.x);
  if (threadIdx.x < 32 || !bug) {
    // BUG
    sync_block();
  } else {
    sync_warp();
    barrier_sync(1, 64);
  }
  store(out + threadIdx.x, tile.at[threadIdx.x]);
}

// Two warps, producer and consumer, hand a tile over and back.
__global__ void handover(const float* x, float* out, bool bug) {
  Tile& tile = static_shared<Tile>();
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp) {
    for (int step = 0; step < 4; ++step) {
      if (step > 0 && !bug) barrier_sync(2, 64);  // the tile is free again
      // BUG
      tile.at[lane] = load(x + step * kWarp + lane);
      barrier_arrive(1, 64);
      if (bug) barrier_sync(2, 64);
    }
  } else {
    for (int step = 0; step < 4; ++step) {
      barrier_sync(1, 64);
      if (bug) barrier_arrive(2, 64);
      // BUG
      store(out + step * kWarp + lane, tile.at[kWarp - 1 - lane]);
      if (!bug && step < 3) barrier_arrive(2, 64);
    }
  }
}

__global__ void output_left_out(const float* x, float* out, bool bug) {
  if (bug && threadIdx.x == 40) return;
  store(out + threadIdx.x, load(x + threadIdx.x));
}

__global__ void writes_its_input(float* x, float* out, bool bug) {
  const float v = load(x + threadIdx.x);
  store(out + threadIdx.x, v);
  // BUG
  if (bug) store(x + threadIdx.x, 0.0f);
}

struct TooLarge {
  float at[2 * kThreads];
};

__global__ void layout_too_large(const float* x, float* out, bool bug) {
  // BUG
  float* tile = bug ? dynamic_shared<TooLarge>().at : dynamic_shared<Tile>().at;
  tile[threadIdx.x] = load(x + threadIdx.x);
  store(out + threadIdx.x, tile[threadIdx.x]);
}

// ---- Launches that no GPU takes, of a kernel without fault ----

// One for each name of `kWhich`, since what a kernel has been allowed stays.
template <int kWhich>
__global__ void __launch_bounds__(kThreads) add_one(const float* x, float* out) {
  store(out + threadIdx.x, load(x + threadIdx.x) + 1.0f);
}

struct Large {
  float at[12 * 1024 + 1];
};
__global__ void static_beyond_48_kb(const float* x, float* out, bool bug) {
  // BUG
  float* tile = bug ? static_shared<Large>().at : static_shared<Tile>().at;
  tile[threadIdx.x] = load(x + threadIdx.x);
  store(out + threadIdx.x, tile[threadIdx.x]);
}

}  // namespace
}  // namespace gemma2::cuda

// Launches a planted kernel; null or the fault. Unknown names are a fault of the caller.
extern "C" const char* gemma2_planted(const char* name, void* a, void* b, void* c, bool bug) {
  using namespace gemma2::cuda;
  gemma2::CudaCall call = {};
  const auto is = [&](const char* wanted) { return strcmp(name, wanted) == 0; };
  const auto in = static_cast<const float*>(a);
  const auto out = static_cast<float*>(b);
  if (is("reverse"))
    launch(call, name, reverse, 1, kThreads, 0, in, out, bug);
  else if (is("exchange_between_warps"))
    launch(call, name, exchange_between_warps, 1, kThreads, sizeof(Tile), in, out, bug);
  else if (is("stream"))
    launch(call, name, stream, 1, kThreads, sizeof(Stages), in, out, bug);
  else if (is("refill_too_early"))
    launch(call, name, refill_too_early, 1, kThreads, sizeof(Stages), in, out, bug);
  else if (is("swizzled"))
    launch(call, name, swizzled, 1, kWarp, 0, static_cast<const uint16_t*>(a),
           static_cast<uint32_t*>(b), bug);
  else if (is("product"))
    launch(call, name, product, 1, kWarp, 0, static_cast<const uint16_t*>(a),
           static_cast<const uint16_t*>(b), static_cast<float*>(c), bug);
  else if (is("past_the_tile"))
    launch(call, name, past_the_tile, 1, kThreads, 0, in, out, bug);
  else if (is("past_the_tensor"))
    launch(call, name, past_the_tensor, 2, kThreads, 0, in, out, bug);
  else if (is("before_the_tensor"))
    launch(call, name, before_the_tensor, 1, kThreads, 0, in, out, bug);
  else if (is("never_zeroed"))
    launch(call, name, never_zeroed, 1, kThreads, 0, in, out, bug);
  else if (is("sum_of_blocks"))
    launch(call, name, sum_of_blocks, 2, kThreads, 0, in, out, bug);
  else if (is("count_of_blocks"))
    launch(call, name, count_of_blocks, 5, kThreads, 0, static_cast<int*>(b), bug);
  else if (is("misaligned"))
    launch(call, name, misaligned, 1, 16, 0, in, out, bug);
  else if (is("shuffle_inactive"))
    launch(call, name, shuffle_inactive, 1, kWarp, 0, in, out, bug);
  else if (is("shuffle_after_the_end"))
    launch(call, name, shuffle_after_the_end, 1, kWarp, 0, in, out, bug);
  else if (is("barrier_in_a_branch"))
    launch(call, name, barrier_in_a_branch, 1, kThreads, 0, in, out, bug);
  else if (is("handover"))
    launch(call, name, handover, 1, kThreads, 0, in, out, bug);
  else if (is("output_left_out"))
    launch(call, name, output_left_out, 1, kThreads, 0, in, out, bug);
  else if (is("writes_its_input"))
    launch(call, name, writes_its_input, 1, kThreads, 0, static_cast<float*>(a), out, bug);
  else if (is("layout_too_large"))
    launch(call, name, layout_too_large, 1, kThreads, sizeof(Tile), in, out, bug);
  else if (is("threads_beyond_the_bounds"))
    launch(call, name, add_one<0>, 1, bug ? kThreads + kWarp : kThreads, 0, in, out);
  else if (is("threads_beyond_1024"))
    launch(call, name, product, 1, bug ? 1025 : kWarp, 0, static_cast<const uint16_t*>(a),
           static_cast<const uint16_t*>(b), static_cast<float*>(c), false);
  else if (is("shared_not_asked_for"))
    return bug ? gemma2::emulator::launch(name, 1, kThreads, 48 * 1024 + 16, add_one<1>, in, out)
               : (launch(call, name, add_one<2>, 1, kThreads, 48 * 1024 + 16, in, out), call.error);
  else if (is("shared_beyond_the_device"))
    launch(call, name, add_one<3>, 1, kThreads, (bug ? 227 * 1024 + 16 : 227 * 1024), in, out);
  else if (is("shared_beyond_a_small_device"))
    launch(call, name, add_one<4>, 1, kThreads, (bug ? 99 * 1024 + 16 : 99 * 1024), in, out);
  else if (is("static_beyond_48_kb"))
    launch(call, name, static_beyond_48_kb, 1, kThreads, 0, in, out, bug);
  else if (is("grid_y") || is("grid_z")) {
    const unsigned n = bug ? 65536 : 1;
    launch(call, name, add_one<5>, is("grid_y") ? dim3(1, n) : dim3(1, 1, n), kThreads, 0, in, out);
  } else if (is("grid_x"))
    launch(call, name, add_one<5>, dim3(bug ? 0x80000000u : 1), kThreads, 0, in, out);
  else
    return "there is no such planted kernel";
  return call.error;
}
