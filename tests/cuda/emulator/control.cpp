// What Python sees of the emulator, by ctypes (tests/cuda/emulation.py).

#include <exception>

#include "common/mutate.h"
#include "cuda/emulator/runtime.h"

using namespace gemma2::emulator;

extern "C" {

void gemma2_emulator_configure(uint64_t seed, int order, int landing, int counting) {
  settings() = {seed, static_cast<Order>(order), static_cast<Landing>(landing), counting != 0};
}

// A fault of csrc/common/mutate.h from now on; "": none. false: there is no such fault.
bool gemma2_emulator_mutate(const char* name) {
  try {
    gemma2::active_mutation = gemma2::mutation_named(name);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// As JSON: by kernel. Valid until the next call.
const char* gemma2_emulator_counters() {
  static std::string text;
  text = counters_json();
  return text.c_str();
}
void gemma2_emulator_reset_counters() { rt().counters.clear(); }

// Launches so far, whether counted or not.
uint64_t gemma2_emulator_blocks() { return rt().serial; }

// access: 0 read, 1 write, 2 both.
void gemma2_emulator_add_region(const char* name, const void* p, int64_t rows, int64_t bytes,
                                int64_t stride, int access) {
  add_region(name, p, bytes, {{rows, stride}}, static_cast<Access>(access));
}
const char* gemma2_emulator_check_written(const char* kernel) { return check_written(kernel); }
void gemma2_emulator_clear_regions() { clear_regions(); }

}  // extern "C"
