// linear for at most 16 rows of x (decode, drafts to verify), 16-bit numbers: weights are read
// once, and that takes all the time there is.
//
// A block takes tiles of 16 rows of the weight; its warps share K, a segment of 256 each: 9 warps
// for K = 2304, 8 for 2048, four rounds of 9 for 9216. A warp copies its weights into a ring of its
// own in shared memory, 2 KB (16 rows of 64 k: whole lines) at a time, and goes on to the next
// round and tile without waiting for other warps: three copies are on their way, also past the
// barrier of a round. Its rows of x are in registers, read again (from the caches, which weights
// pass by) only where there are several rounds. The sums of the segments meet in shared memory,
// where a thread each adds those of an element, in order. Blocks are as many as get the same number
// of tiles among those that run at a time: no last few that others wait for.
//
// Planned: 288 threads. Up to 8 rows: 88 registers, 81 KB of shared memory, two blocks a
// multiprocessor (one on sm_86). For more: 128 registers, 90 KB, one block. A block keeps 54 KB on
// their way; 3.3 TB/s, 132 multiprocessors and 1 us from request to use want 25 KB on each.
//
// Bound by memory: 2 N K bytes. The tensor cores' work is padded to 8 rows of x, which costs
// nothing: 16 instructions for 8 KB, which a multiprocessor receives in 0.33 us. x comes from the
// second-level cache once a block and, with several rounds, once a tile: at 16 rows as many bytes
// as the tile's weights.
//
// Tried: weights straight into the registers that the tensor cores take them from, without a ring.
// The compiler lets these loads share one scoreboard, so each would wait for all. Not split over
// blocks, which would take a second launch: 1024 rows of the weight occupy 64 multiprocessors, with
// 3.5 MB on their way.
//
// Called by csrc/cuda/linear.cu.

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/linear_product.h"

namespace gemma2::cuda {
namespace {

constexpr int kRows = 16;      // of the weight, in a tile
constexpr int kMostRows = 16;  // of x
constexpr int kMostWarps = 9;
constexpr int kThreads = kMostWarps * kWarp;
constexpr int kStages = kSegment / kStage;  // of a segment, and in the ring
constexpr int kStageBytes = kRows * 2 * kStage;

// Blocks on a multiprocessor, for kGroups times 8 rows of x.
template <int kGroups>
constexpr int kBlocks = kGroups == 1 ? 2 : 1;

struct Few {
  LinearParams p;
  int n, k, tiles, segments, rounds;
  int warps;  // that multiply; a block may have more, which only add
};

// The sums of a segment for 8 rows of x, so that the lanes that write (an element of all fragments)
// lie in different banks, and so do those that read (16 sums of one row of x and of the next).
constexpr int kSums = kRows * 8;
GEMMA2_DEVICE int sum_at(int row, int of_x) {
  const int part = row / 8 + of_x % 2 * 2;  // the element of a fragment
  return part * 32 + (of_x / 2 ^ part) * 8 + row % 8;
}

template <int kGroups>
struct alignas(128) Shared {
  unsigned char ring[kMostWarps][kStages][kStageBytes];
  float sums[2][kMostWarps][kGroups][kSums];  // of a round and the one before
};

// What a warp copies: stage after stage of its segments, round after round, tile after tile.
template <typename T>
class Copies {
 public:
  GEMMA2_DEVICE Copies(const Few& f, unsigned char* ring)
      : f_(f), ring_(ring), offset_(tile_offset<kStage>(first_row(), chunk())) {
    begin(blockIdx.x);
  }

  // Starts the next one, number `stage` of its segment, as a group of copies, which may be empty.
  GEMMA2_DEVICE void start(int stage) {
    if (tile_ < f_.tiles) {
      const T* from = from_ + k_;  // of what is not valid, nothing is read
#pragma unroll
      for (int i = 0; i < kRows; i += 4) {
        // Four rows further, the bits that tell chunks apart are exclusive-ored with 4.
        unsigned char* to = ring_ + stage * kStageBytes + i * 2 * kStage + (offset_ ^ i % 8 * 16);
        copy_async<16>(to, from, k_ < f_.k && i < rows_);
        from += 4 * f_.p.weight_stride;
      }
      advance();
    }
    copy_async_commit();
  }

 private:
  // A lane copies chunk lane % 8 of rows lane / 8, lane / 8 + 4, ..
  GEMMA2_DEVICE int chunk() const { return threadIdx.x % 8; }
  GEMMA2_DEVICE int first_row() const { return threadIdx.x % kWarp / 8; }

  GEMMA2_DEVICE void begin(int tile) {
    const int row = tile * kRows + first_row(), warp = threadIdx.x / kWarp;
    tile_ = warp < f_.warps ? tile : f_.tiles;
    rows_ = f_.n - row;
    from_ = static_cast<const T*>(f_.p.weight) + row * f_.p.weight_stride;
    k_ = warp * kSegment + chunk() * 8;
  }
  GEMMA2_DEVICE void advance() {
    k_ += kStage;
    if (k_ % kSegment >= kStage) return;  // of the same segment
    k_ += (f_.warps - 1) * kSegment;
    if (k_ >= f_.segments * kSegment) begin(tile_ + gridDim.x);
  }

  const Few& f_;
  unsigned char* const ring_;
  const int offset_;  // of the first chunk, in a stage
  const T* from_;     // the first row
  int tile_, rows_, k_;
};

// Operand B of a segment, two words a step: rows of x that there are not are its last one again,
// and their sums are left.
template <int kGroups>
using Segment = uint32_t[kSegment / kStep][kGroups][2];

template <typename T, int kGroups>
GEMMA2_DEVICE void load_x(Segment<kGroups>& x, const Few& f, int round) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = (round * f.warps + warp) * kSegment + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int row = min(j * 8 + lane / 4, static_cast<int>(f.p.m) - 1);
    const T* from = static_cast<const T*>(f.p.x) + row * f.p.x_stride;
#pragma unroll
    for (int i = 0; i < kSegment / 8; ++i) {
      const int k = first + i * 8;
      x[i / 2][j][i % 2] = k < f.k ? load(reinterpret_cast<const uint32_t*>(from + k)) : 0;
    }
  }
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, kBlocks<kGroups>) few_kernel(Few f) {
  auto& shared = dynamic_shared<Shared<kGroups>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = threadIdx.x % kRows, of_x = threadIdx.x / kRows;  // whose sums it adds

  Copies<T> copies(f, shared.ring[warp][0]);
#pragma unroll 1
  for (int i = 0; i + 1 < kStages; ++i) copies.start(i);

  Segment<kGroups> x;
  int parity = 0;
  for (int tile = blockIdx.x; tile < f.tiles; tile += gridDim.x) {
    float total = 0;
    for (int round = 0; round < f.rounds; ++round) {
      const int segments = min(f.warps, f.segments - round * f.warps);
      if (warp < segments) {
        if (f.rounds > 1 || tile == static_cast<int>(blockIdx.x)) load_x<T, kGroups>(x, f, round);
        float sum[kGroups][4] = {};
#pragma unroll
        for (int i = 0; i < kStages; ++i) {
          // Past the barrier, the oldest copy is there, and all lanes are done with the one before.
          copy_async_wait<kStages - 2>();
          sync_warp();
          copies.start((i + kStages - 1) % kStages);
          const unsigned char* stage = shared.ring[warp][i];
#pragma unroll
          for (int step = 0; step < kStage / kStep; ++step) {
            uint32_t w[4];
            load_rows<kStage>(w, stage, 0, step);
#pragma unroll
            for (int j = 0; j < kGroups; ++j)
              mma_16x8x16<T>(sum[j], w, x[i * (kStage / kStep) + step][j]);
          }
        }
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            store(&shared.sums[parity][warp][j][sum_at(lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2)],
                  sum[j][e]);
      }
      // One barrier a round: who writes to these sums again has passed the next round's.
      sync_block();
      if (of_x < f.p.m) {
#pragma unroll 3
        for (int w = 0; w < segments; ++w)
          total += load(&shared.sums[parity][w][of_x / 8][sum_at(row, of_x % 8)]);
      }
      parity ^= 1;
    }
    const int64_t n = int64_t{tile} * kRows + row;
    if (of_x < f.p.m && n < f.n)
      store(static_cast<T*>(f.p.out) + of_x * f.p.n + n, from_float<T>(total));
  }
}

template <typename T, int kGroups>
void run(const Few& f, CudaCall& call) {
  const int64_t resident = resident_blocks(kBlocks<kGroups>, sizeof(Shared<kGroups>));
  const int64_t tiles_of_a_block = ceil_div(f.tiles, resident);
  const int threads = f.warps * kWarp > kGroups * kSums ? f.warps * kWarp : kGroups * kSums;
  launch(call, "linear few", few_kernel<T, kGroups>, ceil_div(f.tiles, tiles_of_a_block), threads,
         sizeof(Shared<kGroups>), f);
}

}  // namespace

// Of 16-bit numbers. Rows and k are counted in 32 bits.
bool linear_few_takes(const LinearParams& p) {
  constexpr int64_t kMost = 1 << 30;
  return p.m <= kMostRows && p.n <= kMost && p.k <= kMost && p.k % 8 == 0 &&
         rows_of_16_bytes<bf16_t>(p.x, p.x_stride) &&
         rows_of_16_bytes<bf16_t>(p.weight, p.weight_stride);
}

void linear_few(const LinearParams& p, CudaCall& call) {
  if (p.m == 0 || p.n == 0) return;
  const int segments = static_cast<int>(ceil_div(p.k, kSegment));
  const int rounds = segments == 0 ? 1 : static_cast<int>(ceil_div(segments, kMostWarps));
  const Few f = {
      .p = p,
      .n = static_cast<int>(p.n),
      .k = static_cast<int>(p.k),
      .tiles = static_cast<int>(ceil_div(p.n, kRows)),
      .segments = segments,
      .rounds = rounds,
      .warps = static_cast<int>(ceil_div(segments, rounds)),
  };
  const auto rows = [&](auto t) {
    using T = typename decltype(t)::type;
    p.m <= 8 ? run<T, 1>(f, call) : run<T, 2>(f, call);
  };
  p.dtype == DType::f16 ? rows(Type<f16_t>{}) : rows(Type<bf16_t>{});
}

}  // namespace gemma2::cuda
