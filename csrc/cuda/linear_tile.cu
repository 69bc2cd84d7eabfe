// linear for any number of rows, 16-bit numbers, in the order of linear_product.h: what
// deterministic mode takes for more than 16 rows, and whatever is not aligned to 16 bytes.
//
// A block of 4 warps makes 64 columns of out (rows of the weight) for 128 rows of x, a warp 32 for
// 64. Stages of 64 k go by in shared memory, two of them on their way; one barrier a stage. A
// segment's sums are 64 floats a thread, the totals of those before it 64 more: this order costs
// them. The result passes through shared memory, so that rows of out are written 16 bytes at a
// time. Blocks that run at a time share rows of the weight first.
//
// Planned: 128 threads, 216 registers, 72 KB of shared memory: two blocks a
// multiprocessor, one on sm_86. Bound by the tensor cores, and as much by shared memory: a warp
// reads 6 KB for 32 instructions. Not the fast way: cuBLAS has larger tiles, and wgmma on sm_90.
//
// Called by csrc/cuda/linear.cu.

#include "cuda/launch.h"
#include "cuda/linear_product.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of out, rows of the weight
constexpr int kRows = 128;    // of x
constexpr int kStages = 3;
constexpr int kWarpColumns = 32, kWarpRows = 64;
constexpr int kOutStride = kColumns + 8;  // so that rows of out begin 4 banks apart

struct Stage {
  unsigned char weight[kColumns * 2 * kStage], x[kRows * 2 * kStage];
};
template <typename T>
union alignas(128) Shared {
  Stage stages[kStages];
  T out[kRows * kOutStride];
};

// What a thread copies of a matrix: chunk threadIdx.x % 8 of every 16th row of the block's kCount.
// Asynchronously, if kAligned says that rows have whole chunks of 16 bytes.
template <typename T, bool kAligned, int kCount>
struct Copies {
  static constexpr int kApart = kThreads / 8;  // rows
  const T* from;
  int64_t stride;
  int rows;    // that there are, this one and those below
  int offset;  // in a tile

  GEMMA2_DEVICE Copies(const void* matrix, int64_t row_stride, int64_t first, int64_t all) {
    const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
    from = static_cast<const T*>(matrix) + (first + row) * row_stride + chunk * 8;
    stride = row_stride;
    rows = static_cast<int>(all - first < kCount ? all - first : kCount) - row;
    offset = tile_offset<kStage>(row, chunk);  // the same in all of its rows
  }

  // Numbers [k, k + 64) of the rows, of which `end` are left for this thread: zeros where there are
  // none, of which nothing is read.
  GEMMA2_DEVICE void start(unsigned char* tile, int64_t k, int64_t end) const {
    const T* chunk = from + k;
#pragma unroll
    for (int i = 0; i < kCount; i += kApart) {
      unsigned char* to = tile + offset + i * 2 * kStage;
      if constexpr (kAligned) {
        copy_async<16>(to, chunk, i < rows && end > 0);
      } else {
        uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (i < rows && e < end) words[e / 2] |= uint32_t{load(chunk + e).bits} << e % 2 * 16;
        store(reinterpret_cast<uint4*>(to), uint4{words[0], words[1], words[2], words[3]});
      }
      chunk += kApart * stride;
    }
  }
};

using Sums = float[kWarpColumns / 16][kWarpRows / 8][4];

template <typename T>
GEMMA2_DEVICE void multiply(Sums& sums, const Stage& stage, int column, int row) {
#pragma unroll
  for (int step = 0; step < kStage / kStep; ++step) {
    uint32_t w[kWarpColumns / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpColumns / 16; ++i)
      load_rows<kStage>(w[i], stage.weight, column + i * 16, step);
#pragma unroll
    for (int j = 0; j < kWarpRows / 8; j += 2) {
      uint32_t x[2][2];
      load_keys<kStage>(x[0], x[1], stage.x, row + j * 8, step);
#pragma unroll
      for (int i = 0; i < kWarpColumns / 16; ++i) {
        mma_16x8x16<T>(sums[i][j], w[i], x[0]);
        mma_16x8x16<T>(sums[i][j + 1], w[i], x[1]);
      }
    }
  }
}

GEMMA2_DEVICE void add_segment(Sums& totals, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kWarpColumns / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpRows / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        totals[i][j][e] += sums[i][j][e];
        sums[i][j][e] = 0;
      }
}

template <typename T, bool kAligned>
GEMMA2_DEVICE void write_out(const LinearParams& p, const T* tile, int64_t first_row,
                             int64_t first_column) {
  T* out = static_cast<T*>(p.out) + first_row * p.n + first_column;
  const int chunk = threadIdx.x % 8;
  for (int row = threadIdx.x / 8; row < kRows && first_row + row < p.m; row += kThreads / 8) {
    const T* from = tile + row * kOutStride + chunk * 8;
    T* to = out + row * p.n + chunk * 8;
    if constexpr (kAligned) {
      if (first_column + chunk * 8 < p.n)
        store(reinterpret_cast<uint4*>(to), load(reinterpret_cast<const uint4*>(from)));
    } else {
      for (int e = 0; e < 8 && first_column + chunk * 8 + e < p.n; ++e)
        store(to + e, load(from + e));
    }
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) tile_kernel(LinearParams p, int row_tiles) {
  auto& shared = dynamic_shared<Shared<T>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = warp % 2 * kWarpColumns,
            row = warp / 2 * kWarpRows;  // the warp's, in the tile
  const int64_t first_row = int64_t{blockIdx.x % row_tiles} * kRows;
  const int64_t first_column = int64_t{blockIdx.x / row_tiles} * kColumns;
  const int count = static_cast<int>((p.k + kStage - 1) / kStage);

  const Copies<T, kAligned, kColumns> weight(p.weight, p.weight_stride, first_column, p.n);
  const Copies<T, kAligned, kRows> x(p.x, p.x_stride, first_row, p.m);
  const auto start = [&](int i) {
    if (i < count) {
      Stage& stage = shared.stages[i % kStages];
      const int64_t k = int64_t{i} * kStage, end = p.k - k - threadIdx.x % 8 * 8;
      weight.start(stage.weight, k, end);
      x.start(stage.x, k, end);
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i + 1 < kStages; ++i) start(i);

  Sums totals = {}, sums = {};
  for (int i = 0; i < count; ++i) {
    // Past the barrier, stage i is there, and all are done with the one before.
    copy_async_wait<kStages - 2>();
    sync_block();
    start(i + kStages - 1);
    multiply<T>(sums, shared.stages[i % kStages], column, row);
    if (i % (kSegment / kStage) == kSegment / kStage - 1) add_segment(totals, sums);
  }
  add_segment(totals, sums);

  sync_block();  // the stages become the result
#pragma unroll
  for (int i = 0; i < kWarpColumns / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpRows / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store(&shared.out[(row + j * 8 + lane % 4 * 2 + e % 2) * kOutStride + column + i * 16 +
                          lane / 4 + e / 2 * 8],
              from_float<T>(totals[i][j][e]));
  sync_block();
  write_out<T, kAligned>(p, shared.out, first_row, first_column);
}

template <typename T>
void run(const LinearParams& p, CudaCall& call) {
  const bool aligned = p.k % 8 == 0 && p.n % 8 == 0 && rows_of_16_bytes<T>(p.x, p.x_stride) &&
                       rows_of_16_bytes<T>(p.weight, p.weight_stride) &&
                       rows_of_16_bytes<T>(p.out, p.n);
  const int64_t row_tiles = ceil_div(p.m, kRows);
  launch(call, "linear tile", aligned ? tile_kernel<T, true> : tile_kernel<T, false>,
         row_tiles * ceil_div(p.n, kColumns), kThreads, sizeof(Shared<T>), p,
         static_cast<int>(row_tiles));
}

}  // namespace

void linear_tile(const LinearParams& p, CudaCall& call) {
  p.dtype == DType::f16 ? run<f16_t>(p, call) : run<bf16_t>(p, call);
}

}  // namespace gemma2::cuda
