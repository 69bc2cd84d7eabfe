#include "cpu/capability.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace gemma2 {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::portable;
}

std::vector<Isa> compiled() {
  std::vector<Isa> out;
  std::istringstream list(GEMMA2_ISA_LIST);
  for (std::string name; std::getline(list, name, ',');)
    for (int i = 0; i < 4; ++i)
      if (name == kNames[i]) out.push_back(static_cast<Isa>(i));
  return out;
}

Isa choose() {
  std::vector<Isa> usable;
  for (Isa isa : compiled())
    if (processor_has(isa)) usable.push_back(isa);
  if (usable.empty())
    throw std::runtime_error("gemma2 was built for " GEMMA2_ISA_LIST
                             ": this processor can run none of them");
  const char* wanted = std::getenv("GEMMA2_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable.back();
  std::string names;
  for (Isa isa : usable) {
    if (std::string(wanted) == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument(std::string("GEMMA2_CPU_ISA is '") + wanted +
                              "': this build and processor can run " + names);
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> out;
  for (Isa isa : compiled()) out.emplace_back(isa_name(isa));
  return out;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> out;
  for (Isa isa : compiled())
    if (processor_has(isa)) out.emplace_back(isa_name(isa));
  return out;
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace gemma2
