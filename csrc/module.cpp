// gemma2._C: what was built and what this processor can run. No tensors, no torch headers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU capability of gemma2.";
  m.def("compiled_isas", &gemma2::compiled_isas, "Instruction sets in this build, weakest first.");
  m.def("supported_isas", &gemma2::supported_isas, "Those of them that this processor can run.");
  m.def(
      "isa", [] { return std::string(gemma2::isa_name(gemma2::chosen_isa())); },
      "The instruction set in use. Raises ValueError when GEMMA2_CPU_ISA cannot be honoured.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = GEMMA2_VERSION;
        info["compiler"] = __VERSION__;
        info["built_with_torch"] = GEMMA2_BUILT_WITH_TORCH;
        info["cuda"] = GEMMA2_BUILT_CUDA;
#ifdef GEMMA2_TEST_MUTATIONS
        info["test_mutations"] = true;
#else
        info["test_mutations"] = false;
#endif
        return info;
      },
      "Version, compiler, torch at build time, CUDA kernels (empty: none), test build.");
}
