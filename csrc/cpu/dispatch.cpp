#include "common/mutate.h"
#include "cpu/capability.h"
#include "cpu/kernels.h"

#ifdef GEMMA2_TEST_MUTATIONS
#include <cstdlib>
#include <stdexcept>
#include <string>
#endif

namespace gemma2 {

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    switch (chosen_isa()) {
// Each is there if the build has it (CMakeLists.txt: GEMMA2_ISAS).
#ifdef GEMMA2_HAS_avx512bf16
      case Isa::avx512bf16:
        return avx512bf16::kernels;
#endif
#ifdef GEMMA2_HAS_avx512
      case Isa::avx512:
        return avx512::kernels;
#endif
#ifdef GEMMA2_HAS_avx2
      case Isa::avx2:
        return avx2::kernels;
#endif
#ifdef GEMMA2_HAS_portable
      case Isa::portable:
        return portable::kernels;
#endif
      default:
        break;
    }
    // chosen_isa() gives only what was built.
    __builtin_unreachable();
  }();
  return chosen;
}

#ifdef GEMMA2_TEST_MUTATIONS
namespace {
Mutation read_mutation() {
  const char* value = std::getenv("GEMMA2_MUTATE");
  const std::string name = value == nullptr ? "" : value;
  if (name.empty()) return Mutation::none;
  if (name == "cap_dropped") return Mutation::cap_dropped;
  if (name == "logits_cap_dropped") return Mutation::logits_cap_dropped;
  if (name == "window_off_by_one") return Mutation::window_off_by_one;
  if (name == "norm_without_one") return Mutation::norm_without_one;
  if (name == "embed_unrounded") return Mutation::embed_unrounded;
  if (name == "ring_slot_shifted") return Mutation::ring_slot_shifted;
  if (name == "future_visible") return Mutation::future_visible;
  throw std::invalid_argument("GEMMA2_MUTATE: no mutation is named '" + name + "'");
}
}  // namespace
const Mutation active_mutation = read_mutation();
#endif

}  // namespace gemma2
