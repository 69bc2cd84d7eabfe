// The random numbers of `sample`: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3", Random123). A pure function of a counter and a key, so every element of every
// step has its own numbers, the same on all devices, whatever the threads do.
//
//   key     = (seed low, seed high)
//   counter = (v / 4, row, step low, step high)      for vocabulary index v; `low` and `high` are
//   32 bits each word    = output[v % 4]                           so one evaluation serves four
//   neighbours u       = (word + 1/2) / 2^32                     in (0, 1), exact in float64 gumbel
//   = -ln(-ln u)
//
// All 32 bits count: the largest of V Gumbel numbers comes from u within about 1 / V of 1, where a
// u of 24 bits has few values left and ties would favour low indices. In float32, -ln u near 1 is
// therefore computed from 1 - u = (~word + 1/2) / 2^32.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace gemma2 {

// U is uint32_t or a vector of them; multiply(a, b, high, low) gives both halves of the product
// with the number a. static: every instruction set has its own.
template <typename U, typename Multiply>
GEMMA2_HOST_DEVICE static inline void philox4x32_10(U (&counter)[4], uint32_t key0, uint32_t key1,
                                                    const Multiply& multiply) {
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply(0xD2511F53u, counter[0], high0, low0);
    multiply(0xCD9E8D57u, counter[2], high1, low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace gemma2
