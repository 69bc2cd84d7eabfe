// The kernels of this instruction set, gathered.
#include "cpu/kernels.h"

namespace gemma2::GEMMA2_ISA {

const CpuKernels kernels = {
    .embed = embed,
    .rms_norm = rms_norm,
    .add_rms_norm = add_rms_norm,
    .rope = rope,
    .cache_write = cache_write,
    .rope_cache = rope_cache,
    .attention = attention,
    .geglu = geglu,
    .softcap = softcap,
    .linear = linear,
    .sample = sample,
};

}  // namespace gemma2::GEMMA2_ISA
