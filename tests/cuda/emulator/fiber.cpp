#include "cuda/emulator/fiber.h"

namespace gemma2::emulator {

#if defined(__x86_64__)

// What a callee must keep (System V ABI): rbx, rbp, r12 to r15. The control words of the floating
// point units never change here.
extern "C" void gemma2_emulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden gemma2_emulator_switch
.globl gemma2_emulator_switch
.type gemma2_emulator_switch, @function
gemma2_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gemma2_emulator_switch, . - gemma2_emulator_switch
)");

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  // As if `entry` had been called from address 0, where a backtrace ends.
  uint64_t* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack) + bytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) {
  gemma2_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace gemma2::emulator
