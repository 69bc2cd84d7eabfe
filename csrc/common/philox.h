// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128 random bits
// from a counter and a key, without state, so that every device draws the same integers.
//
// The sampler's convention: key = (seed low, seed high), counter = (index / 4, row, step low, step high),
// and word index % 4 of the result belongs to the vocabulary index.
#pragma once

#include <stdint.h>

namespace gemma2 {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// The uniform number in (0, 1) of a random integer: 23 bits and a half, exact in float32 at both ends.
constexpr int kUniformShift = 9;
constexpr float kUniformScale = 1.0f / 8388608.0f;

// Word is uint32_t or a vector of them; mulhilo(a, b, &hi, &lo) multiplies to 64 bits.
template <typename Word, typename MulHiLo>
static inline void philox4x32_10(Word c[4], uint32_t k0, uint32_t k1, const MulHiLo& mulhilo) {
  for (int round = 0; round < 10; ++round) {
    Word hi0, lo0, hi1, lo1;
    mulhilo(kPhiloxM0, c[0], &hi0, &lo0);
    mulhilo(kPhiloxM1, c[2], &hi1, &lo1);
    const Word c1 = c[1], c3 = c[3];
    c[0] = hi1 ^ c1 ^ k0;
    c[1] = lo1;
    c[2] = hi0 ^ c3 ^ k1;
    c[3] = lo0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

}  // namespace gemma2
