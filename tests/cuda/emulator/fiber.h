// Threads of a block that run in turns on one system thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace gemma2::emulator {

// One suspended line of execution. ucontext would do everywhere, but enters the system at each
// switch; a kernel that shuffles switches millions of times.
class Fiber {
 public:
  // Starts `entry` on the given stack at the first switch to it. `entry` must never return.
  void prepare(void* stack, size_t bytes, void (*entry)());

#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Suspends the running line into `from` and goes on with `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace gemma2::emulator
