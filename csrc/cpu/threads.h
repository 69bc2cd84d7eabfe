// torch's thread pool, seen from files that include no torch header.
#pragma once

#include <stdint.h>

namespace gemma2 {

// Runs body(begin, end, ctx) over [0, n) in pieces of at least `grain`; torch.set_num_threads is
// obeyed. Nested calls run in the calling thread. The body must not throw.
void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* ctx),
                  void* ctx);
int num_threads();

}  // namespace gemma2
