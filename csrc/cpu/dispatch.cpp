#include "cpu/capability.h"
#include "cpu/kernels.h"

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

}  // namespace gemma2
