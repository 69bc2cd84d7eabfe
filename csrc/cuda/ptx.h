// The machine under the kernels: memory accesses of a given width, warp and block primitives,
// tensor cores, approximate functions. The only file with inline PTX.
//
// Compiled for a host with GEMMA2_EMULATE, the same names come from tests/cuda/emulator, where
// every wrapper has a twin written from the PTX manual that checks its arguments, too. So kernels
// use these wrappers for whatever should be counted or has a meaning across threads, and plain C++
// otherwise.
//
// Fragment layouts: PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16" and the sections beside it.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/dtype.h"

#ifdef GEMMA2_EMULATE

#include "cuda/emulator/device.h"  // tests/cuda/emulator/device.h

#else

namespace gemma2::cuda {

#define GEMMA2_DEVICE __device__ __forceinline__

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Memory ----

GEMMA2_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One access of sizeof(T) bytes, global or shared: T is 1, 2, 4, 8 or 16 bytes wide and aligned.
template <typename T>
GEMMA2_DEVICE T load(const T* p) {
  return *p;
}
// In PTX where it is wide, since the compiler may split a struct's assignment into its members.
// Which space it is, is mostly known at compile time.
template <typename T>
GEMMA2_DEVICE void store(T* p, T value) {
  if constexpr (sizeof(T) == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(&value);
    if (__isShared(p))
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.x),
                   "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory");
    else
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                   "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory");
  } else if constexpr (std::is_same_v<T, uint2> || std::is_same_v<T, float2>) {
    const uint2 v = *reinterpret_cast<const uint2*>(&value);
    if (__isShared(p))
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared_address(p)), "r"(v.x), "r"(v.y)
                   : "memory");
    else
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x),
                   "r"(v.y)
                   : "memory");
  } else {
    *p = value;
  }
}

// 16 bytes of global memory that no one writes during the kernel and that will not be read again
// soon: they leave the first-level cache to others.
GEMMA2_DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

GEMMA2_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The block's dynamic shared memory, as many bytes as the launch asked for. The type of the tile is
// the layout.
template <typename T>
GEMMA2_DEVICE T& dynamic_shared() {
  extern __shared__ __align__(128) unsigned char gemma2_dynamic_shared[];
  return *reinterpret_cast<T*>(gemma2_dynamic_shared);
}
// Static shared memory: one object of each type a block, without a constructor.
template <typename T>
GEMMA2_DEVICE T& static_shared() {
  __shared__ T storage;
  return storage;
}

// ---- Copies that do not wait ----

// Copies kBytes (4, 8 or 16) from global to shared memory; where `valid` is false, writes zeros and
// reads nothing. Lands when the thread has waited for its group; others need a barrier after that.
template <int kBytes>
GEMMA2_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int read = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(read)
                 : "memory");
}
// Ends a group of this thread's copies.
GEMMA2_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
GEMMA2_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Barriers ----

GEMMA2_DEVICE void sync_block() { __syncthreads(); }
GEMMA2_DEVICE void sync_warp(unsigned lanes = kAllLanes) { __syncwarp(lanes); }
// Barrier `id` (1 to 15) of `threads` threads, a multiple of 32: arriving does not wait.
GEMMA2_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
GEMMA2_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
GEMMA2_DEVICE void fence_block() { __threadfence_block(); }
GEMMA2_DEVICE void fence_device() { __threadfence(); }

// ---- Within a warp; T is 4 or 8 bytes wide ----

template <typename T>
GEMMA2_DEVICE T shuffle(T v, int lane, unsigned lanes = kAllLanes) {
  return __shfl_sync(lanes, v, lane);
}
template <typename T>
GEMMA2_DEVICE T shuffle_xor(T v, int bits, unsigned lanes = kAllLanes) {
  return __shfl_xor_sync(lanes, v, bits);
}
template <typename T>
GEMMA2_DEVICE T shuffle_up(T v, unsigned delta, unsigned lanes = kAllLanes) {
  return __shfl_up_sync(lanes, v, delta);
}
template <typename T>
GEMMA2_DEVICE T shuffle_down(T v, unsigned delta, unsigned lanes = kAllLanes) {
  return __shfl_down_sync(lanes, v, delta);
}
GEMMA2_DEVICE unsigned ballot(bool p, unsigned lanes = kAllLanes) {
  return __ballot_sync(lanes, p);
}
GEMMA2_DEVICE bool any(bool p, unsigned lanes = kAllLanes) { return __any_sync(lanes, p); }
GEMMA2_DEVICE bool all(bool p, unsigned lanes = kAllLanes) { return __all_sync(lanes, p); }

// ---- Atomics on integers, relaxed: there are none on floats, whose sums would depend on the order
// ----

template <typename T>
GEMMA2_DEVICE T atomic_add(T* p, T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "integers of 4 or 8 bytes");
  return atomicAdd(p, v);
}
template <typename T>
GEMMA2_DEVICE T atomic_or(T* p, T v) {
  return atomicOr(p, v);
}
template <typename T>
GEMMA2_DEVICE T atomic_max(T* p, T v) {
  return atomicMax(p, v);
}

// ---- Numbers ----

// 2^x: within 2 ulp (PTX ISA, ex2); results below 2^-126 become 0.
GEMMA2_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// tanh x: relative error at most 2^-11 (PTX ISA, tanh), so it may pass 1 by that.
GEMMA2_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GEMMA2_DEVICE float to_float(float x) { return x; }
GEMMA2_DEVICE float to_float(bf16_t x) { return __uint_as_float(uint32_t{x.bits} << 16); }
GEMMA2_DEVICE float to_float(f16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Rounded to the nearest, ties to even.
template <typename T>
GEMMA2_DEVICE T from_float(float x);
template <>
GEMMA2_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
GEMMA2_DEVICE bf16_t from_float<bf16_t>(float x) {
  bf16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
GEMMA2_DEVICE f16_t from_float<f16_t>(float x) {
  f16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two 16-bit numbers in a word, the first in the low half, as they lie in memory.
template <typename T>
GEMMA2_DEVICE uint32_t pack2(float first, float second);
template <>
GEMMA2_DEVICE uint32_t pack2<bf16_t>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <>
GEMMA2_DEVICE uint32_t pack2<f16_t>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// ---- Tensor cores: all 32 lanes together, D = A B + D ----

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 and
// gets of matrix m the elements (l / 4, 2 (l % 4)) and the next one in r[m]. x2 and x1 read the
// addresses of lanes 0-15 and 0-7.
GEMMA2_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: lane l gets the elements (2 (l % 4), l / 4) and the one
// below.
GEMMA2_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix_transposed(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}

// stmatrix: the way back, sm_90 and newer.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
GEMMA2_DEVICE void stmatrix(const uint32_t (&r)[4], void* row) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}
GEMMA2_DEVICE void stmatrix(const uint32_t (&r)[2], void* row) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1])
      : "memory");
}
GEMMA2_DEVICE void stmatrix(const uint32_t (&r)[1], void* row) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
               "r"(r[0])
               : "memory");
}
GEMMA2_DEVICE void stmatrix_transposed(const uint32_t (&r)[4], void* row) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
GEMMA2_DEVICE void stmatrix_transposed(const uint32_t (&r)[2], void* row) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1])
      : "memory");
}
GEMMA2_DEVICE void stmatrix_transposed(const uint32_t (&r)[1], void* row) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
      "r"(r[0])
      : "memory");
}
#endif

// 16x8 += 16x16 times 16x8, elements of T: bf16_t or f16_t.
template <typename T>
GEMMA2_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
GEMMA2_DEVICE void mma_16x8x16<bf16_t>(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
GEMMA2_DEVICE void mma_16x8x16<f16_t>(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 16x8 += 16x8 times 8x8 of float32 read as tf32: the low 13 bits do not count.
GEMMA2_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 16x8 += 16x32 times 32x8 of int8, in int32.
GEMMA2_DEVICE void mma_16x8x32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- The end ----

// Stops the kernel with a message: for what can be neither checked before the launch nor computed.
#define GEMMA2_STOP(text)                                                                        \
  do {                                                                                           \
    printf("gemma2: %s (block %d, %d, thread %d)\n", text, blockIdx.x, blockIdx.y, threadIdx.x); \
    __trap();                                                                                    \
  } while (0)

}  // namespace gemma2::cuda

#endif  // GEMMA2_EMULATE
