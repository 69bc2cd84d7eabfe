// Which instruction set the CPU kernels run on: the best one that was built and that the processor
// has, or the one named by GEMMA2_CPU_ISA (portable, avx2, avx512, avx512bf16).
#pragma once

#include <string>
#include <vector>

namespace gemma2 {

enum class Isa : int { portable, avx2, avx512, avx512bf16 };

std::vector<std::string> compiled_isas();   // those in this build, weakest first
std::vector<std::string> supported_isas();  // those of them that this processor can run
Isa chosen_isa();  // throws std::invalid_argument when GEMMA2_CPU_ISA cannot be honoured
const char* isa_name(Isa isa);

}  // namespace gemma2
