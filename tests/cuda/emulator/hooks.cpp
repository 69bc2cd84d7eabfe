// What g++ -fsanitize=thread calls at every access to memory of a kernel file: here it is not
// ThreadSanitizer's runtime that answers, but the emulator.

#include "cuda/emulator/runtime.h"

namespace gemma2::emulator {
namespace {

inline void plain(const void* p, size_t bytes, Kind kind, void* site, bool aligned = true) {
  Runtime& r = rt();
  if (!r.running || r.suspended) return;
  check_access(*r.current, p, bytes, kind, aligned);
  if (r.counting)
    note_access(*r.current, p, bytes, kind, kind == Kind::read ? "plain read" : "plain write", site,
                -1);
}

}  // namespace
}  // namespace gemma2::emulator

using gemma2::emulator::Kind;
using gemma2::emulator::plain;

extern "C" {

#define GEMMA2_HOOKS(bytes)                                                                        \
  void __tsan_read##bytes(void* p) { plain(p, bytes, Kind::read, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* p) { plain(p, bytes, Kind::write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                     \
    plain(p, bytes, Kind::read, __builtin_return_address(0));                                      \
  }                                                                                                \
  void __tsan_unaligned_write##bytes(void* p) {                                                    \
    plain(p, bytes, Kind::write, __builtin_return_address(0));                                     \
  }
GEMMA2_HOOKS(1)
GEMMA2_HOOKS(2)
GEMMA2_HOOKS(4)
GEMMA2_HOOKS(8)
GEMMA2_HOOKS(16)
#undef GEMMA2_HOOKS

// Copies of structs, which a compiler for the device splits as their alignment allows.
void __tsan_read_range(void* p, size_t bytes) {
  plain(p, bytes, Kind::read, __builtin_return_address(0), false);
}
void __tsan_write_range(void* p, size_t bytes) {
  plain(p, bytes, Kind::write, __builtin_return_address(0), false);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
