// Kernels that show one wrapper of csrc/cuda/ptx.h each, raw: a lane loads its registers from an
// array [32][registers], runs the instruction and stores what it got. Which element of a matrix is
// where is for tests/cuda/test_twins.py to say. Built for the emulator and, by nvcc, for a GPU:
// the same tests must pass on both.

#include <string.h>

#include "cuda/launch.h"

namespace gemma2::cuda {
namespace {

struct Arguments {
  const void *a, *b, *c;
  void* d;
  int64_t n;
};
template <typename T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}

// ---- mma: n products, a block each. a [n][32][4], b [n][32][2], c and d [n][32][4]. ----

struct Bf16 {
  using Number = float;
  GEMMA2_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16<bf16_t>(d, a, b);
  }
};
struct F16 {
  using Number = float;
  GEMMA2_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16<f16_t>(d, a, b);
  }
};
struct Tf32 {
  using Number = float;
  GEMMA2_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x8_tf32(d, a, b);
  }
};
struct S8 {
  using Number = int32_t;
  GEMMA2_DEVICE static void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x32_s8(d, a, b);
  }
};

template <typename Shape, typename Number>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const Number* c, Number* d) {
  const int64_t lane = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  uint32_t mine_a[4], mine_b[2];
  Number mine[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mine_a[i] = load(a + lane * 4 + i);
    mine[i] = load(c + lane * 4 + i);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) mine_b[i] = load(b + lane * 2 + i);
  Shape::mma(mine, mine_a, mine_b);
#pragma unroll
  for (int i = 0; i < 4; ++i) store(d + lane * 4 + i, mine[i]);
}

template <typename Shape>
void run_mma(const Arguments& x, CudaCall& call) {
  using Number = typename Shape::Number;
  launch(call, "twin_mma", mma_kernel<Shape, Number>, x.n, kWarp, 0, in<uint32_t>(x.a),
         in<uint32_t>(x.b), in<Number>(x.c), static_cast<Number*>(x.d));
}

// ---- ldmatrix and stmatrix ----
//
// Shared memory is 2048 bytes; b [32] gives every lane's row address as bytes from its beginning.
// ldmatrix: a [2048 bytes] is what lies there, d [32][count]. stmatrix: a [32][count], c and d are
// the shared memory before and after.

constexpr int kTileWords = 2048 / 4;
struct alignas(128) Tile {
  uint32_t words[kTileWords];
};

template <int kCount, bool kTransposed>
__global__ void ldmatrix_kernel(const uint32_t* a, const int32_t* b, uint32_t* d) {
  Tile& tile = static_shared<Tile>();
  const int lane = threadIdx.x;
  for (int i = lane; i < kTileWords; i += kWarp) store(tile.words + i, load(a + i));
  sync_block();
  const void* row = reinterpret_cast<const unsigned char*>(&tile) + load(b + lane);
  uint32_t r[kCount];
  if constexpr (kTransposed)
    ldmatrix_transposed(r, row);
  else
    ldmatrix(r, row);
#pragma unroll
  for (int i = 0; i < kCount; ++i) store(d + lane * kCount + i, r[i]);
}

template <int kCount, bool kTransposed>
__global__ void stmatrix_kernel(const uint32_t* a, const int32_t* b, const uint32_t* c,
                                uint32_t* d) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Tile& tile = static_shared<Tile>();
  const int lane = threadIdx.x;
  for (int i = lane; i < kTileWords; i += kWarp) store(tile.words + i, load(c + i));
  sync_block();
  void* row = reinterpret_cast<unsigned char*>(&tile) + load(b + lane);
  uint32_t r[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) r[i] = load(a + lane * kCount + i);
  if constexpr (kTransposed)
    stmatrix_transposed(r, row);
  else
    stmatrix(r, row);
  sync_block();
  for (int i = lane; i < kTileWords; i += kWarp) store(d + i, load(tile.words + i));
#else
  GEMMA2_STOP("stmatrix is for sm_90 and newer");
#endif
}

template <int kCount, bool kTransposed>
void run_ldmatrix(const Arguments& x, CudaCall& call) {
  launch(call, "twin_ldmatrix", ldmatrix_kernel<kCount, kTransposed>, 1, kWarp, 0,
         in<uint32_t>(x.a), in<int32_t>(x.b), static_cast<uint32_t*>(x.d));
}
template <int kCount, bool kTransposed>
void run_stmatrix(const Arguments& x, CudaCall& call) {
  launch(call, "twin_stmatrix", stmatrix_kernel<kCount, kTransposed>, 1, kWarp, 0,
         in<uint32_t>(x.a), in<int32_t>(x.b), in<uint32_t>(x.c), static_cast<uint32_t*>(x.d));
}

// ---- Shuffles and votes: n warps, a block each; c [n] are the lanes that take part ----

struct Index {
  template <typename T>
  GEMMA2_DEVICE static T shuffle(T v, int argument, unsigned lanes) {
    return cuda::shuffle(v, argument, lanes);
  }
};
struct Xor {
  template <typename T>
  GEMMA2_DEVICE static T shuffle(T v, int argument, unsigned lanes) {
    return shuffle_xor(v, argument, lanes);
  }
};
struct Up {
  template <typename T>
  GEMMA2_DEVICE static T shuffle(T v, int argument, unsigned lanes) {
    return shuffle_up(v, argument, lanes);
  }
};
struct Down {
  template <typename T>
  GEMMA2_DEVICE static T shuffle(T v, int argument, unsigned lanes) {
    return shuffle_down(v, argument, lanes);
  }
};

// a [n][32] values, b [n][32] arguments; d is `a` where a lane takes no part.
template <typename Kind, typename T>
__global__ void shuffle_kernel(const T* a, const int32_t* b, const uint32_t* c, T* d) {
  const int64_t lane = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const unsigned lanes = load(c + blockIdx.x);
  T v = load(a + lane);
  if (lanes >> threadIdx.x & 1) v = Kind::shuffle(v, load(b + lane), lanes);
  store(d + lane, v);
}
template <typename Kind, typename T>
void run_shuffle(const Arguments& x, CudaCall& call) {
  launch(call, "twin_shuffle", shuffle_kernel<Kind, T>, x.n, kWarp, 0, in<T>(x.a), in<int32_t>(x.b),
         in<uint32_t>(x.c), static_cast<T*>(x.d));
}

// a [n][32] predicates; d [n][32][3]: ballot, any, all; zeros where a lane takes no part.
__global__ void votes_kernel(const int32_t* a, const uint32_t* c, uint32_t* d) {
  const int64_t lane = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const unsigned lanes = load(c + blockIdx.x);
  const bool p = load(a + lane) != 0;
  uint32_t votes[3] = {0, 0, 0};
  if (lanes >> threadIdx.x & 1) {
    votes[0] = ballot(p, lanes);
    votes[1] = any(p, lanes);
    votes[2] = all(p, lanes);
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) store(d + lane * 3 + i, votes[i]);
}
void run_votes(const Arguments& x, CudaCall& call) {
  launch(call, "twin_votes", votes_kernel, x.n, kWarp, 0, in<int32_t>(x.a), in<uint32_t>(x.c),
         static_cast<uint32_t*>(x.d));
}

// ---- Numbers: d [n] = f(a [n]) ----

struct Exp2 {
  using From = float;
  using To = float;
  GEMMA2_DEVICE static float of(float x) { return exp2_approx(x); }
};
struct Tanh {
  using From = float;
  using To = float;
  GEMMA2_DEVICE static float of(float x) { return tanh_approx(x); }
};
template <typename T>
struct ToFloat {
  using From = T;
  using To = float;
  GEMMA2_DEVICE static float of(T x) { return to_float(x); }
};
template <typename T>
struct FromFloat {
  using From = float;
  using To = T;
  GEMMA2_DEVICE static T of(float x) { return from_float<T>(x); }
};
template <typename T>
struct Pack2 {  // of pairs
  using From = float2;
  using To = uint32_t;
  GEMMA2_DEVICE static uint32_t of(float2 x) { return pack2<T>(x.x, x.y); }
};

constexpr int kThreads = 256;
template <typename F, typename From, typename To>
__global__ void each_kernel(const From* a, To* d, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) store(d + i, F::of(load(a + i)));
}
template <typename F>
void run_each(const Arguments& x, CudaCall& call) {
  using From = typename F::From;
  using To = typename F::To;
  launch(call, "twin_each", each_kernel<F, From, To>, ceil_div(x.n, kThreads), kThreads, 0,
         in<From>(x.a), static_cast<To*>(x.d), x.n);
}

// ---- Asynchronous copies ----

template <int kBytes>
struct Bytes {  // as one access
  using Unit = uint4;
};
template <>
struct Bytes<8> {
  using Unit = uint2;
};
template <>
struct Bytes<4> {
  using Unit = uint32_t;
};

// Lane l copies kBytes from byte b[l][0] of `a` if b[l][1]; then everybody takes its neighbour's.
template <int kBytes, typename Unit>
__global__ void copy_kernel(const unsigned char* a, const int32_t* b, Unit* d) {
  struct Copied {
    Unit at[kWarp];
  };
  Copied& tile = static_shared<Copied>();
  const int lane = threadIdx.x;
  copy_async<kBytes>(tile.at + lane, a + load(b + 2 * lane), load(b + 2 * lane + 1) != 0);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  const int neighbour = (lane + 1) % kWarp;
  store(d + neighbour, load(tile.at + neighbour));
}
template <int kBytes>
void run_copy(const Arguments& x, CudaCall& call) {
  using Unit = typename Bytes<kBytes>::Unit;
  launch(call, "twin_copy", copy_kernel<kBytes, Unit>, 1, kWarp, 0, in<unsigned char>(x.a),
         in<int32_t>(x.b), static_cast<Unit*>(x.d));
}

// Four groups, of which the second is empty and the third copies twice; a lane uses what it copied
// as soon as its group must have landed. a and d [32][4] of 16 bytes.
__global__ void groups_kernel(const uint4* a, uint4* d) {
  struct Copied {
    uint4 at[kWarp][4];
  };
  Copied& tile = static_shared<Copied>();
  const int lane = threadIdx.x;
  uint4* mine = tile.at[lane];
  const uint4* from = a + lane * 4;
  uint4* to = d + lane * 4;
  copy_async<16>(mine, from);
  copy_async_commit();
  copy_async_commit();
  copy_async<16>(mine + 1, from + 1);
  copy_async<16>(mine + 2, from + 2);
  copy_async_commit();
  copy_async<16>(mine + 3, from + 3);
  copy_async_commit();
  copy_async_wait<3>();
  store(to, load(mine));
  copy_async_wait<1>();
  store(to + 1, load(mine + 1));
  store(to + 2, load(mine + 2));
  copy_async_wait<0>();
  store(to + 3, load(mine + 3));
}
void run_groups(const Arguments& x, CudaCall& call) {
  launch(call, "twin_groups", groups_kernel, 1, kWarp, 0, in<uint4>(x.a), static_cast<uint4*>(x.d));
}

// ---- Atomics: thread i of n applies b[i] to cell a[i] of d; d [64 + n]: cells, then what was
// there

struct Add {
  template <typename T>
  GEMMA2_DEVICE static T apply(T* p, T v) {
    return atomic_add(p, v);
  }
};
struct Or {
  template <typename T>
  GEMMA2_DEVICE static T apply(T* p, T v) {
    return atomic_or(p, v);
  }
};
struct Max {
  template <typename T>
  GEMMA2_DEVICE static T apply(T* p, T v) {
    return atomic_max(p, v);
  }
};

constexpr int kCells = 64;
template <typename Kind, typename T>
__global__ void atomic_kernel(const int32_t* a, const T* b, T* d, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) store(d + kCells + i, Kind::apply(d + load(a + i), load(b + i)));
}
template <typename Kind, typename T>
void run_atomic(const Arguments& x, CudaCall& call) {
  launch(call, "twin_atomic", atomic_kernel<Kind, T>, ceil_div(x.n, kThreads), kThreads, 0,
         in<int32_t>(x.a), in<T>(x.b), static_cast<T*>(x.d), x.n);
}

// ---- What the emulator refuses; on a GPU all of it is undefined ----

#ifdef GEMMA2_EMULATE
__global__ void ldmatrix_of_global_memory_kernel(const uint32_t* a, uint32_t* d) {
  uint32_t r[1];
  ldmatrix(r, a + 4 * threadIdx.x);
  store(d + threadIdx.x, r[0]);
}
void run_ldmatrix_of_global_memory(const Arguments& x, CudaCall& call) {
  launch(call, "twin_bad", ldmatrix_of_global_memory_kernel, 1, kWarp, 0, in<uint32_t>(x.a),
         static_cast<uint32_t*>(x.d));
}

__global__ void mma_of_half_a_warp_kernel(float* d) {
  float mine[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  if (threadIdx.x < 16) mma_16x8x16<bf16_t>(mine, a, b);
  for (int i = 0; i < 4; ++i) store(d + threadIdx.x * 4 + i, mine[i]);
}
void run_mma_of_half_a_warp(const Arguments& x, CudaCall& call) {
  launch(call, "twin_bad", mma_of_half_a_warp_kernel, 1, kWarp, 0, static_cast<float*>(x.d));
}

// Half of the warp is at ldmatrix.x4, the other half at ldmatrix.x2.
__global__ void different_forms_kernel(uint32_t* d) {
  Tile& tile = static_shared<Tile>();
  const int lane = threadIdx.x;
  for (int i = lane; i < kTileWords; i += kWarp) store(tile.words + i, 0u);
  sync_block();
  uint32_t four[4] = {}, two[2] = {};
  if (lane < 16)
    ldmatrix(four, tile.words + 4 * lane);
  else
    ldmatrix(two, tile.words + 4 * lane);
  store(d + lane, four[0] + two[0]);
}
void run_different_forms(const Arguments& x, CudaCall& call) {
  launch(call, "twin_bad", different_forms_kernel, 1, kWarp, 0, static_cast<uint32_t*>(x.d));
}
#endif

using u32 = uint32_t;
using u64 = unsigned long long;  // as CUDA's atomics name it

const struct {
  const char* name;
  void (*run)(const Arguments&, CudaCall&);
} kTwins[] = {
    {"mma_16x8x16_bf16", run_mma<Bf16>},
    {"mma_16x8x16_f16", run_mma<F16>},
    {"mma_16x8x8_tf32", run_mma<Tf32>},
    {"mma_16x8x32_s8", run_mma<S8>},
    {"ldmatrix_x1", run_ldmatrix<1, false>},
    {"ldmatrix_x2", run_ldmatrix<2, false>},
    {"ldmatrix_x4", run_ldmatrix<4, false>},
    {"ldmatrix_transposed_x1", run_ldmatrix<1, true>},
    {"ldmatrix_transposed_x2", run_ldmatrix<2, true>},
    {"ldmatrix_transposed_x4", run_ldmatrix<4, true>},
    {"stmatrix_x1", run_stmatrix<1, false>},
    {"stmatrix_x2", run_stmatrix<2, false>},
    {"stmatrix_x4", run_stmatrix<4, false>},
    {"stmatrix_transposed_x1", run_stmatrix<1, true>},
    {"stmatrix_transposed_x2", run_stmatrix<2, true>},
    {"stmatrix_transposed_x4", run_stmatrix<4, true>},
    {"shuffle_32", run_shuffle<Index, u32>},
    {"shuffle_64", run_shuffle<Index, u64>},
    {"shuffle_xor_32", run_shuffle<Xor, u32>},
    {"shuffle_xor_64", run_shuffle<Xor, u64>},
    {"shuffle_up_32", run_shuffle<Up, u32>},
    {"shuffle_up_64", run_shuffle<Up, u64>},
    {"shuffle_down_32", run_shuffle<Down, u32>},
    {"shuffle_down_64", run_shuffle<Down, u64>},
    {"votes", run_votes},
    {"exp2_approx", run_each<Exp2>},
    {"tanh_approx", run_each<Tanh>},
    {"to_float_bf16", run_each<ToFloat<bf16_t>>},
    {"to_float_f16", run_each<ToFloat<f16_t>>},
    {"from_float_bf16", run_each<FromFloat<bf16_t>>},
    {"from_float_f16", run_each<FromFloat<f16_t>>},
    {"pack2_bf16", run_each<Pack2<bf16_t>>},
    {"pack2_f16", run_each<Pack2<f16_t>>},
    {"copy_async_4", run_copy<4>},
    {"copy_async_8", run_copy<8>},
    {"copy_async_16", run_copy<16>},
    {"copy_async_groups", run_groups},
    {"atomic_add_32", run_atomic<Add, int32_t>},
    {"atomic_add_64", run_atomic<Add, u64>},
    {"atomic_or_32", run_atomic<Or, u32>},
    {"atomic_max_32", run_atomic<Max, int32_t>},
#ifdef GEMMA2_EMULATE
    {"ldmatrix_of_global_memory", run_ldmatrix_of_global_memory},
    {"mma_of_half_a_warp", run_mma_of_half_a_warp},
    {"different_forms", run_different_forms},
#endif
};

}  // namespace
}  // namespace gemma2::cuda

// Runs the kernel of this name; null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* gemma2_twin(const char* name,
                                                                          const void* a,
                                                                          const void* b,
                                                                          const void* c, void* d,
                                                                          int64_t n, void* stream) {
  for (const auto& twin : gemma2::cuda::kTwins) {
    if (strcmp(twin.name, name) != 0) continue;
    gemma2::CudaCall call = {stream, nullptr, nullptr, nullptr};
    twin.run({a, b, c, d, n}, call);
    return call.error;
  }
  return "there is no twin of this name";
}
