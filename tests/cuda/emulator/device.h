// What csrc/cuda/ptx.h is on a host: the same names, each a twin that checks and counts. Shuffles
// and memory are here; tensor cores and approximate functions are in twins.h.
#pragma once

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "common/dtype.h"
#include "common/mutate.h"
#include "cuda/emulator/emulator.h"
#include "cuda/emulator/host.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
// The bound stays with the kernel: a no-op for each warp before its first instruction, which
// emulator::launch counts (launch_bound in host.cpp).
#define __launch_bounds__(...) \
  __attribute__((patchable_function_entry(::gemma2::emulator::warps_of_bound(__VA_ARGS__))))
#define __restrict__ __restrict
#define __grid_constant__
#define GEMMA2_DEVICE inline __attribute__((always_inline))

#define threadIdx (::gemma2::emulator::thread_index())
#define blockIdx (::gemma2::emulator::block_index())
#define blockDim (::gemma2::emulator::block_dim())
#define gridDim (::gemma2::emulator::grid_dim())

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int bits) { return __uint_as_float((uint32_t)bits); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// Within 2 ulp; of a divisor beyond 2^126 it is the product with 0 (CUDA C++ Programming Guide,
// table of intrinsic functions).
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? a * 0.0f : a / b; }

namespace gemma2::cuda {

using std::max;
using std::min;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Memory ----

template <typename T>
GEMMA2_DEVICE T load(const T* p) {
  T v;
  emulator::read_memory(&v, p, sizeof(T), "load");
  return v;
}
template <typename T>
GEMMA2_DEVICE void store(T* p, T value) {
  emulator::write_memory(p, &value, sizeof(T), "store");
}
GEMMA2_DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  emulator::read_memory(&v, p, sizeof v, "load_once");
  return v;
}
// Never faults and moves nothing that a kernel could see.
GEMMA2_DEVICE void prefetch_l2(const void*) { emulator::count("prefetch_l2"); }

template <typename T>
GEMMA2_DEVICE T& dynamic_shared() {
  return *static_cast<T*>(emulator::dynamic_shared_memory(sizeof(T)));
}
template <typename T>
GEMMA2_DEVICE T& static_shared() {
  static const char key = 0;
  return *static_cast<T*>(emulator::static_shared_memory(&key, sizeof(T), alignof(T)));
}

// ---- Copies that do not wait ----

template <int kBytes>
GEMMA2_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, kBytes, valid ? kBytes : 0);
}
GEMMA2_DEVICE void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
GEMMA2_DEVICE void copy_async_wait() {
  emulator::copy_async_wait(kPending + (mutated(Mutation::waits_too_little) ? 1 : 0));
}

// ---- Barriers ----

GEMMA2_DEVICE void sync_block() { emulator::block_barrier(); }
GEMMA2_DEVICE void sync_warp(unsigned lanes = kAllLanes) { emulator::warp_barrier(lanes); }
GEMMA2_DEVICE void barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
GEMMA2_DEVICE void barrier_arrive(int id, int threads) {
  emulator::named_barrier(id, threads, false);
}
// Within a block, orders this thread's accesses only, and barriers do that, too.
GEMMA2_DEVICE void fence_block() { emulator::count("fence_block"); }
GEMMA2_DEVICE void fence_device() { emulator::device_fence(); }

// ---- Within a warp ----

namespace twin {

struct Shuffle {
  uint64_t value;  // what this lane gives
  int source;      // the lane it wants
  uint64_t result;
};
void shuffle_all(void* const* data, unsigned lanes);
template <typename T>
GEMMA2_DEVICE T shuffle(const char* what, T v, int source, unsigned lanes) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle mine = {0, source, 0};
  memcpy(&mine.value, &v, sizeof v);
  emulator::meet(what, lanes, &mine, shuffle_all);
  memcpy(&v, &mine.result, sizeof v);
  return v;
}

struct Vote {
  bool p;
  unsigned ballot;
};
void vote_all(void* const* data, unsigned lanes);
GEMMA2_DEVICE unsigned vote(const char* what, bool p, unsigned lanes) {
  Vote mine = {p, 0};
  emulator::meet(what, lanes, &mine, vote_all);
  return mine.ballot;
}

}  // namespace twin

template <typename T>
GEMMA2_DEVICE T shuffle(T v, int lane, unsigned lanes = kAllLanes) {
  return twin::shuffle("shuffle", v, lane & 31, lanes);
}
template <typename T>
GEMMA2_DEVICE T shuffle_xor(T v, int bits, unsigned lanes = kAllLanes) {
  return twin::shuffle("shuffle_xor", v, (emulator::lane() ^ bits) & 31, lanes);
}
// Out of the warp, a lane gets its own value.
template <typename T>
GEMMA2_DEVICE T shuffle_up(T v, unsigned delta, unsigned lanes = kAllLanes) {
  const int source = emulator::lane() - (int)delta;
  return twin::shuffle("shuffle_up", v, source < 0 ? emulator::lane() : source, lanes);
}
template <typename T>
GEMMA2_DEVICE T shuffle_down(T v, unsigned delta, unsigned lanes = kAllLanes) {
  const int source = emulator::lane() + (int)delta;
  return twin::shuffle("shuffle_down", v, source > 31 ? emulator::lane() : source, lanes);
}
GEMMA2_DEVICE unsigned ballot(bool p, unsigned lanes = kAllLanes) {
  return twin::vote("ballot", p, lanes);
}
GEMMA2_DEVICE bool any(bool p, unsigned lanes = kAllLanes) {
  return twin::vote("any", p, lanes) != 0;
}
GEMMA2_DEVICE bool all(bool p, unsigned lanes = kAllLanes) {
  return twin::vote("all", p, lanes) == lanes;
}

// ---- Atomics ----

template <typename T>
GEMMA2_DEVICE T atomic_add(T* p, T v) {
  return emulator::atomic(p, "atomic_add", [v](T old) { return static_cast<T>(old + v); });
}
template <typename T>
GEMMA2_DEVICE T atomic_or(T* p, T v) {
  return emulator::atomic(p, "atomic_or", [v](T old) { return static_cast<T>(old | v); });
}
template <typename T>
GEMMA2_DEVICE T atomic_max(T* p, T v) {
  return emulator::atomic(p, "atomic_max", [v](T old) { return old > v ? old : v; });
}

}  // namespace gemma2::cuda

#include "cuda/emulator/twins.h"

#define GEMMA2_STOP(text) ::gemma2::emulator::fault("stopped: %s", text)
