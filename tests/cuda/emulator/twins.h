// Host twins of the tensor-core instructions, the approximate functions and the conversions of
// csrc/cuda/ptx.h, written from the PTX ISA manual (9.0). Included by device.h.
//
// A twin does what the manual promises and no more: where the manual leaves something open, results
// are such that a kernel that counts on more than the promise is off. tests/cuda/test_twins.py runs
// the same tests on these twins and, on a machine with a GPU, on the instructions.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "cuda/emulator/emulator.h"

namespace gemma2::cuda {

// ---- Numbers ----

namespace twin {

uint16_t bf16_bits(float x);
uint16_t f16_bits(float x);
float float_of_f16(uint16_t bits);
float exp2(float x);
float tanh(float x);

}  // namespace twin

// Within 2 units in the last place of the correctly rounded result (and so within 2^-22 of the
// exact one, the bound of older manuals), in this range at random: nothing depends on the last
// bits.
GEMMA2_DEVICE float exp2_approx(float x) {
  emulator::count("exp2_approx");
  return twin::exp2(x);
}
// Relative error up to 2^-11 at random, so that |tanh| may pass 1.
GEMMA2_DEVICE float tanh_approx(float x) {
  emulator::count("tanh_approx");
  return twin::tanh(x);
}

GEMMA2_DEVICE float to_float(float x) { return x; }
GEMMA2_DEVICE float to_float(bf16_t x) { return __uint_as_float(uint32_t{x.bits} << 16); }
GEMMA2_DEVICE float to_float(f16_t x) { return twin::float_of_f16(x.bits); }

template <typename T>
T from_float(float x);
template <>
GEMMA2_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
GEMMA2_DEVICE bf16_t from_float<bf16_t>(float x) {
  return {twin::bf16_bits(x)};
}
template <>
GEMMA2_DEVICE f16_t from_float<f16_t>(float x) {
  return {twin::f16_bits(x)};
}
template <typename T>
GEMMA2_DEVICE uint32_t pack2(float first, float second) {
  return from_float<T>(first).bits | uint32_t{from_float<T>(second).bits} << 16;
}

// ---- Tensor cores ----
//
// All 32 lanes meet; the last to come works for all of them, in twins.cpp. What a lane gave wrong
// is a fault of that lane, before it meets the others.

namespace twin {

struct Matrices {  // what a lane brings to ldmatrix and stmatrix
  void* row;
  uint32_t* registers;  // of ldmatrix; stmatrix only reads them
};
// kCount matrices, a register each.
template <int kCount, bool kTransposed>
void ldmatrix_all(void* const* lanes, unsigned);
template <int kCount, bool kTransposed>
void stmatrix_all(void* const* lanes, unsigned);

template <int kCount>
GEMMA2_DEVICE void check_row(const char* what, const void* row) {
  if (emulator::lane() >= 8 * kCount) return;  // this lane's address is not used
  if (!emulator::is_shared(row))
    emulator::fault("%s: the row at %p is not in the block's shared memory", what, row);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    emulator::fault("%s: the row at %p is not aligned to 16 bytes", what, row);
}
template <int kCount, bool kTransposed>
GEMMA2_DEVICE void ldmatrix(const char* what, uint32_t (&r)[kCount], const void* row) {
  check_row<kCount>(what, row);
  Matrices mine = {const_cast<void*>(row), r};
  emulator::meet(what, 0xffffffffu, &mine, ldmatrix_all<kCount, kTransposed>);
}
template <int kCount, bool kTransposed>
GEMMA2_DEVICE void stmatrix(const char* what, const uint32_t (&r)[kCount], void* row) {
  check_row<kCount>(what, row);
  Matrices mine = {row, const_cast<uint32_t*>(r)};
  emulator::meet(what, 0xffffffffu, &mine, stmatrix_all<kCount, kTransposed>);
}

template <typename Accumulator>
struct Product {  // what a lane brings to mma
  Accumulator* d;
  const uint32_t* a;
  const uint32_t* b;
};
template <typename T>
void mma_16x8x16_all(void* const* lanes, unsigned);
void mma_16x8x8_tf32_all(void* const* lanes, unsigned);
void mma_16x8x32_s8_all(void* const* lanes, unsigned);

}  // namespace twin

GEMMA2_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  twin::ldmatrix<4, false>("ldmatrix.x4", r, row);
}
GEMMA2_DEVICE void ldmatrix(uint32_t (&r)[2], const void* row) {
  twin::ldmatrix<2, false>("ldmatrix.x2", r, row);
}
GEMMA2_DEVICE void ldmatrix(uint32_t (&r)[1], const void* row) {
  twin::ldmatrix<1, false>("ldmatrix.x1", r, row);
}
GEMMA2_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  twin::ldmatrix<4, true>("ldmatrix.x4.trans", r, row);
}
GEMMA2_DEVICE void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
  twin::ldmatrix<2, true>("ldmatrix.x2.trans", r, row);
}
GEMMA2_DEVICE void ldmatrix_transposed(uint32_t (&r)[1], const void* row) {
  twin::ldmatrix<1, true>("ldmatrix.x1.trans", r, row);
}

GEMMA2_DEVICE void stmatrix(const uint32_t (&r)[4], void* row) {
  twin::stmatrix<4, false>("stmatrix.x4", r, row);
}
GEMMA2_DEVICE void stmatrix(const uint32_t (&r)[2], void* row) {
  twin::stmatrix<2, false>("stmatrix.x2", r, row);
}
GEMMA2_DEVICE void stmatrix(const uint32_t (&r)[1], void* row) {
  twin::stmatrix<1, false>("stmatrix.x1", r, row);
}
GEMMA2_DEVICE void stmatrix_transposed(const uint32_t (&r)[4], void* row) {
  twin::stmatrix<4, true>("stmatrix.x4.trans", r, row);
}
GEMMA2_DEVICE void stmatrix_transposed(const uint32_t (&r)[2], void* row) {
  twin::stmatrix<2, true>("stmatrix.x2.trans", r, row);
}
GEMMA2_DEVICE void stmatrix_transposed(const uint32_t (&r)[1], void* row) {
  twin::stmatrix<1, true>("stmatrix.x1.trans", r, row);
}

// The manual promises products and sums of at least single precision, in no order and with no
// rounding that it names. Here products are exact, summed in double by rising k and rounded once.
template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
GEMMA2_DEVICE void mma_16x8x16<bf16_t>(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  twin::Product<float> mine = {d, a, b};
  emulator::meet("mma_16x8x16<bf16>", 0xffffffffu, &mine, twin::mma_16x8x16_all<bf16_t>);
}
template <>
GEMMA2_DEVICE void mma_16x8x16<f16_t>(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  twin::Product<float> mine = {d, a, b};
  emulator::meet("mma_16x8x16<f16>", 0xffffffffu, &mine, twin::mma_16x8x16_all<f16_t>);
}
// The low 13 bits of an input are replaced by others unless they are all zero: a kernel that wants
// the rounded or the truncated number must make it.
GEMMA2_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::Product<float> mine = {d, a, b};
  emulator::meet("mma_16x8x8<tf32>", 0xffffffffu, &mine, twin::mma_16x8x8_tf32_all);
}
// Sums that do not fit wrap.
GEMMA2_DEVICE void mma_16x8x32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::Product<int32_t> mine = {d, a, b};
  emulator::meet("mma_16x8x32<s8>", 0xffffffffu, &mine, twin::mma_16x8x32_s8_all);
}

}  // namespace gemma2::cuda
