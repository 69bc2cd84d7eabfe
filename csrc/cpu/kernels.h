// The table of CPU kernels: one copy per instruction set, chosen once per process.
#pragma once

#include "params/kernels.h"

namespace gemma2 {

using CpuKernels = KernelTable<>;

// Files under csrc/cpu/ that are compiled per instruction set define these in their own namespace,
// and keep everything else in an anonymous namespace inside it: nothing that the linker could
// share.
#define GEMMA2_DECLARE_KERNELS(isa)                            \
  namespace isa {                                              \
  void embed(const EmbedParams&);                              \
  void rms_norm(const RmsNormParams&);                         \
  void add_rms_norm(const AddRmsNormParams&);                  \
  void rope(const RopeParams&);                                \
  void cache_write(const CacheWriteParams&);                   \
  void rope_cache(const RopeParams&, const CacheWriteParams&); \
  void attention(const AttentionParams&);                      \
  void geglu(const GegluParams&);                              \
  void softcap(const SoftcapParams&);                          \
  void linear(const LinearParams&);                            \
  void sample(const SampleParams&);                            \
  extern const CpuKernels kernels;                             \
  }

GEMMA2_DECLARE_KERNELS(portable)
GEMMA2_DECLARE_KERNELS(avx2)
GEMMA2_DECLARE_KERNELS(avx512)
GEMMA2_DECLARE_KERNELS(avx512bf16)

const CpuKernels& cpu_kernels();

}  // namespace gemma2
