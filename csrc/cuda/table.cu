// The table that this library exports, and whether this machine can run it.

#ifndef GEMMA2_EMULATE
#include <cuda_runtime.h>
#include <stdio.h>
#endif

#include "cuda/kernels.h"

namespace gemma2::cuda {

void embed(const EmbedParams&, CudaCall&);
void rms_norm(const RmsNormParams&, CudaCall&);
void add_rms_norm(const AddRmsNormParams&, CudaCall&);
void rope(const RopeParams&, CudaCall&);
void cache_write(const CacheWriteParams&, CudaCall&);
void rope_cache(const RopeParams&, const CacheWriteParams&, CudaCall&);
void attention(const AttentionParams&, CudaCall&);
void geglu(const GegluParams&, CudaCall&);
void softcap(const SoftcapParams&, CudaCall&);
void linear(const LinearParams&, CudaCall&);
void sample(const SampleParams&, CudaCall&);

namespace {

const CudaKernels kKernels = {
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

}  // namespace
}  // namespace gemma2::cuda

#define GEMMA2_EXPORT __attribute__((visibility("default")))

GEMMA2_EXPORT const gemma2::CudaKernels* gemma2_cuda_kernels() { return &gemma2::cuda::kKernels; }

#ifndef GEMMA2_EMULATE
GEMMA2_EXPORT const char* gemma2_cuda_trouble() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "no NVIDIA driver is loaded";
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 >= runtime / 1000) return nullptr;
  // Minor versions are compatible with each other, major ones are not (CUDA Compatibility guide).
  static char text[160];
  snprintf(
      text, sizeof text,
      "the driver serves CUDA %d.%d, and these kernels were built with CUDA %d.%d: driver %s or "
      "newer is wanted",
      driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10,
      runtime / 1000 >= 13 ? "580" : "525");
  return text;
}
#endif
