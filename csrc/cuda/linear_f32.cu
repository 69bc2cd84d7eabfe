// linear in float32, any shape: what deterministic mode takes in place of cuBLAS.
//
// A block of 256 threads makes 64 rows x 64 columns of out, a thread 4 x 4 that lie 16 apart. 32 k
// go by in shared memory at a time; their products are one chain of FMA by rising k, which then
// joins the total: short chains keep roundings small. The order is the same whatever the shape is.
//
// Planned: 256 threads, 80 registers, 18 KB of shared memory, 24 resident warps. Bound by FMA,
// and as much by reading shared memory: 8 accesses of 16 bytes for 64 FMA. With one row,
// one warp of 8 multiplies. Tensor cores would round to tf32.
//
// Called by csrc/cuda/linear.cu.

#include "cuda/launch.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows, and columns
constexpr int kDepth = 32;  // k
constexpr int kEach = 4;    // rows of a thread, and columns
constexpr int kApart = kTile / kEach;
constexpr int kStride = kDepth + 4;  // so that rows begin 4 banks apart

struct alignas(16) Shared {
  float x[kTile * kStride], weight[kTile * kStride];
};

// Starts the copy of rows [first, first + 64), numbers [k, k + 32) of each: zeros where there are
// none. A warp takes a row.
GEMMA2_DEVICE void copy_rows(float* tile, const void* matrix, int64_t stride, int64_t first,
                             int64_t rows, int64_t k, int64_t end) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const float* base = static_cast<const float*>(matrix);
#pragma unroll 2
  for (int i = row; i < kTile; i += kThreads / kWarp) {
    const bool valid = first + i < rows && k + lane < end;
    copy_async<4>(tile + i * kStride + lane, valid ? base + (first + i) * stride + k + lane : base,
                  valid);
  }
}

GEMMA2_DEVICE float4 load_4(const float* tile, int row, int k) {
  return load(reinterpret_cast<const float4*>(tile + row * kStride + k));
}

__global__ void __launch_bounds__(kThreads, 2) f32_kernel(LinearParams p, int row_tiles) {
  auto& shared = static_shared<Shared>();
  const int row = threadIdx.x / kApart, column = threadIdx.x % kApart;
  const int64_t first_row = int64_t{blockIdx.x % row_tiles} * kTile;
  const int64_t first_column = int64_t{blockIdx.x / row_tiles} * kTile;

  const int64_t rows = p.m - first_row - row;  // this one and those below

  float total[kEach][kEach] = {};
  for (int64_t k = 0; k < p.k; k += kDepth) {
    copy_rows(shared.x, p.x, p.x_stride, first_row, p.m, k, p.k);
    copy_rows(shared.weight, p.weight, p.weight_stride, first_column, p.n, k, p.k);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    float sum[kEach][kEach] = {};
    if (rows > 0) {
#pragma unroll 2
      for (int i = 0; i < kDepth; i += 4) {
        float4 w[kEach];
#pragma unroll
        for (int b = 0; b < kEach; ++b) w[b] = load_4(shared.weight, column + b * kApart, i);
#pragma unroll
        for (int a = 0; a < kEach; ++a) {
          if (a * kApart >= rows) break;
          const float4 x = load_4(shared.x, row + a * kApart, i);
#pragma unroll
          for (int b = 0; b < kEach; ++b) {
            sum[a][b] += x.x * w[b].x;
            sum[a][b] += x.y * w[b].y;
            sum[a][b] += x.z * w[b].z;
            sum[a][b] += x.w * w[b].w;
          }
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kEach; ++a)
#pragma unroll
      for (int b = 0; b < kEach; ++b) total[a][b] += sum[a][b];
    sync_block();
  }
#pragma unroll
  for (int a = 0; a < kEach; ++a)
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      const int64_t m = first_row + row + a * kApart, n = first_column + column + b * kApart;
      if (m < p.m && n < p.n) store(static_cast<float*>(p.out) + m * p.n + n, total[a][b]);
    }
}

}  // namespace

void linear_f32(const LinearParams& p, CudaCall& call) {
  const int64_t row_tiles = ceil_div(p.m, kTile);
  launch(call, "linear f32", f32_kernel, row_tiles * ceil_div(p.n, kTile), kThreads, 0, p,
         static_cast<int>(row_tiles));
}

}  // namespace gemma2::cuda
