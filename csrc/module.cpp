// gemma2._C: what was built, what this processor can run, how launches are planned. No tensors, no
// torch headers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/attention_plan.h"
#include "cpu/capability.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU capability and launch planners of gemma2.";
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

  m.attr("max_splits") = gemma2::kMaxSplits;
  m.def("most_visible_keys", &gemma2::most_visible_keys, py::arg("capacity"), py::arg("window"),
        py::arg("q_length"), "The most keys that the queries of a row can see together.");
  m.def("decode_splits", &gemma2::decode_splits, py::arg("sequences"), py::arg("keys"),
        py::arg("tile"), py::arg("resident"),
        "Splits of decode attention on CUDA, for `sequences` (rows x key/value heads) of at most\n"
        "`keys` keys that are read in tiles of `tile`, where `resident` blocks run at a time.");
  m.def("split_begin", &gemma2::split_begin, py::arg("keys"), py::arg("splits"), py::arg("split"),
        "The first of the keys of split `split`; it ends where the next one begins.");
  m.def("most_sums", &gemma2::most_sums, py::arg("keys"),
        "The most sums of deterministic attention on CUDA that so many neighbouring keys take\n"
        "part in.");
  m.def("sums_side_by_side", &gemma2::sums_side_by_side, py::arg("blocks"), py::arg("rows"),
        py::arg("keys"), py::arg("resident"),
        "In how many blocks deterministic attention on CUDA makes the sums of one of `blocks`\n"
        "blocks of `rows` rows, where `resident` run at a time; 1: it makes them in turn.");
}
