#include "cpu/kernels.h"
namespace gemma2::GEMMA2_ISA {
void rope(const RopeParams&) {}
void rope_cache(const RopeParams&, const CacheWriteParams&) {}
}
