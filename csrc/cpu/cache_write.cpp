#include "cpu/kernels.h"
namespace gemma2::GEMMA2_ISA {
void cache_write(const CacheWriteParams&) {}
}
