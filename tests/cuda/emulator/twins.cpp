// Compiled without the hooks of emulated kernels: what it does with the lanes' registers is no
// access of the kernel; what it does with shared memory is reported by access_as.
#include "cuda/emulator/device.h"

namespace gemma2::cuda::twin {
namespace {

constexpr uint32_t kNaN = 0x7fffffffu;  // the NaN that instructions make

// Well-mixed bits of an argument (the finaliser of MurmurHash3).
uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}
// In [-1, 1), the same for the same argument.
double error_of(float x) { return static_cast<int32_t>(mixed(__float_as_uint(x))) * 0x1p-31; }

}  // namespace

uint16_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

uint16_t f16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
  if (size >= 0x38800000u) {                                              // from 2^-14 on
    const uint32_t rebiased = size - (112u << 23);
    return static_cast<uint16_t>(sign | (rebiased + 0xfffu + (rebiased >> 13 & 1)) >> 13);
  }
  if (size < 0x33000000u) return static_cast<uint16_t>(sign);  // below 2^-25
  // A multiple of 2^-24. A carry makes it the smallest normal number, as it should.
  const uint32_t shift = 126 - (size >> 23);
  const uint32_t mantissa = (size & 0x7fffffu) | 0x800000u;
  const uint32_t whole = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return static_cast<uint16_t>(sign | (whole + (rest > half || (rest == half && (whole & 1)))));
}

float float_of_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = bits >> 10 & 0x1f;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0x1f) return __uint_as_float(mantissa != 0 ? kNaN : sign | 0x7f800000u);
  if (exponent == 0) {
    const float size = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -size : size;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

float exp2(float x) {
  if (isnan(x)) return __uint_as_float(kNaN);
  if (fabsf(x) < 0x1p-126f) return 1.0f;  // also of subnormal arguments, which become 0
  const double exact = ::exp2(static_cast<double>(x));
  if (exact >= 0x1p128) return INFINITY;
  if (exact < 0x1p-126) return 0.0f;
  // 1.5 units in the last place before rounding are at most 2 after it.
  const double unit = ldexp(1.0, ilogb(exact) - 23);
  const float y = static_cast<float>(exact + 1.5 * unit * error_of(x));
  return y < 0x1p-126f ? 0.0f : y;
}

float tanh(float x) {
  if (isnan(x)) return __uint_as_float(kNaN);
  if (isinf(x)) return x > 0 ? 1.0f : -1.0f;
  if (fabsf(x) < 0x1p-126f) return x;  // "passed through"
  // A little less than 2^-11, so that rounding does not leave the bound.
  const double error = 0x1p-11 * (1 - 0x1p-10) * error_of(x);
  return static_cast<float>(::tanh(static_cast<double>(x)) * (1 + error));
}

// ---- ldmatrix and stmatrix ----
//
// The row of lane 8 m + r is row r of matrix m. Without transposition, the two halves of a lane's
// register m are the elements 2 (lane % 4) and + 1 of row lane / 4; with it, of column lane / 4.

namespace {

struct Tile {
  uint16_t at[8][8];
};

template <bool kTransposed>
uint16_t& element(Tile& tile, int lane, int half) {
  const int near = lane / 4, along = 2 * (lane % 4) + half;
  return kTransposed ? tile.at[along][near] : tile.at[near][along];
}

}  // namespace

template <int kCount, bool kTransposed>
void ldmatrix_all(void* const* lanes, unsigned) {
  Tile tiles[kCount];
  for (int m = 0; m < kCount; ++m)
    for (int r = 0; r < 8; ++r) {
      const void* row = static_cast<const Matrices*>(lanes[8 * m + r])->row;
      emulator::access_as(8 * m + r, row, 16, emulator::Kind::read, "ldmatrix", m);
      emulator::peek_memory(tiles[m].at[r], row, 16);
    }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < kCount; ++m) {
      const uint32_t low = element<kTransposed>(tiles[m], lane, 0);
      const uint32_t high = element<kTransposed>(tiles[m], lane, 1);
      static_cast<const Matrices*>(lanes[lane])->registers[m] = low | high << 16;
    }
}

template <int kCount, bool kTransposed>
void stmatrix_all(void* const* lanes, unsigned) {
  Tile tiles[kCount];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < kCount; ++m) {
      const uint32_t word = static_cast<const Matrices*>(lanes[lane])->registers[m];
      element<kTransposed>(tiles[m], lane, 0) = static_cast<uint16_t>(word);
      element<kTransposed>(tiles[m], lane, 1) = static_cast<uint16_t>(word >> 16);
    }
  for (int m = 0; m < kCount; ++m)
    for (int r = 0; r < 8; ++r) {
      void* row = static_cast<const Matrices*>(lanes[8 * m + r])->row;
      emulator::access_as(8 * m + r, row, 16, emulator::Kind::write, "stmatrix", m);
      emulator::poke_memory(row, tiles[m].at[r], 16);
    }
}

template void ldmatrix_all<4, false>(void* const*, unsigned);
template void ldmatrix_all<2, false>(void* const*, unsigned);
template void ldmatrix_all<1, false>(void* const*, unsigned);
template void ldmatrix_all<4, true>(void* const*, unsigned);
template void ldmatrix_all<2, true>(void* const*, unsigned);
template void ldmatrix_all<1, true>(void* const*, unsigned);
template void stmatrix_all<4, false>(void* const*, unsigned);
template void stmatrix_all<2, false>(void* const*, unsigned);
template void stmatrix_all<1, false>(void* const*, unsigned);
template void stmatrix_all<4, true>(void* const*, unsigned);
template void stmatrix_all<2, true>(void* const*, unsigned);
template void stmatrix_all<1, true>(void* const*, unsigned);

// ---- mma ----
//
// All shapes share one pattern. A lane is (group, member) = (lane / 4, lane % 4), and a register
// holds 1, 2 or 4 neighbours along k (kPer). Of A, register r holds row group + 8 (r % 2) and
// starts at k = kPer member + 4 kPer (r / 2); of B, column group and k = kPer member + 4 kPer r. Of
// C and D, register r is row group + 8 (r / 2), column 2 member + r % 2.

namespace {

// D += A B in Number, converted once; `unpack(word, i)` is the i-th number of a register.
template <int kPer, typename Number, typename Accumulator, typename Unpack>
void multiply(void* const* lanes, const Unpack& unpack) {
  constexpr int kK = 8 * kPer;
  Number a[16][kK], b[kK][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& from = *static_cast<const Product<Accumulator>*>(lanes[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int r = 0; r < 4; ++r) {
      d[group + 8 * (r / 2)][2 * member + r % 2] = static_cast<Number>(from.d[r]);
      for (int i = 0; i < kPer; ++i)
        a[group + 8 * (r % 2)][kPer * member + 4 * kPer * (r / 2) + i] = unpack(from.a[r], i);
    }
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < kPer; ++i)
        b[kPer * member + 4 * kPer * r + i][group] = unpack(from.b[r], i);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kK; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& to = *static_cast<const Product<Accumulator>*>(lanes[lane]);
    for (int r = 0; r < 4; ++r)
      to.d[r] = static_cast<Accumulator>(d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2]);
  }
}

double unpack_f32(uint32_t word, int) {
  constexpr uint32_t kLow = 0x1fff;
  if ((word & kLow) != 0) word = (word & ~kLow) | (mixed(word) & kLow);
  return __uint_as_float(word);
}

}  // namespace

template <typename T>
void mma_16x8x16_all(void* const* lanes, unsigned) {
  emulator::count("mma_16x8x16");
  multiply<2, double, float>(lanes, [](uint32_t word, int i) {
    return static_cast<double>(to_float(T{static_cast<uint16_t>(word >> 16 * i)}));
  });
}
template void mma_16x8x16_all<bf16_t>(void* const*, unsigned);
template void mma_16x8x16_all<f16_t>(void* const*, unsigned);

void mma_16x8x8_tf32_all(void* const* lanes, unsigned) {
  emulator::count("mma_16x8x8_tf32");
  multiply<1, double, float>(lanes, unpack_f32);
}

void mma_16x8x32_s8_all(void* const* lanes, unsigned) {
  emulator::count("mma_16x8x32_s8");
  // In unsigned numbers, where wrapping is defined.
  multiply<4, uint32_t, int32_t>(lanes, [](uint32_t word, int i) {
    return static_cast<uint32_t>(static_cast<int8_t>(word >> 8 * i));
  });
}

}  // namespace gemma2::cuda::twin
