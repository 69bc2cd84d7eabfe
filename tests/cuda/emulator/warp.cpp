// What lanes do once they have met: shuffles and votes.

#include "cuda/emulator/device.h"

namespace gemma2::cuda::twin {

void shuffle_all(void* const* data, unsigned lanes) {
  for (int l = 0; l < kWarp; ++l) {
    if (data[l] == nullptr) continue;
    Shuffle& mine = *static_cast<Shuffle*>(data[l]);
    if (!(lanes >> mine.source & 1))
      emulator::fault("shuffle: lane %d reads lane %d, which is not in the mask 0x%08x", l,
                      mine.source, lanes);
    mine.result = static_cast<const Shuffle*>(data[mine.source])->value;
  }
}

void vote_all(void* const* data, unsigned) {
  unsigned ballot = 0;
  for (int l = 0; l < kWarp; ++l)
    if (data[l] != nullptr && static_cast<const Vote*>(data[l])->p) ballot |= 1u << l;
  for (int l = 0; l < kWarp; ++l)
    if (data[l] != nullptr) static_cast<Vote*>(data[l])->ballot = ballot;
}

}  // namespace gemma2::cuda::twin
