// embed: out[t, :] = weight[ids[t], :] * scale, in float32, rounded once (not at all where out is
// float32).
//
// A block takes a token, a thread two packs of 16 bytes (of the wider of the two types), both
// loaded before the first is used: 160 threads at hidden 2304 in bfloat16, 224 at 3584, 288 at
// 4608. Rows that are not aligned to 16 bytes are moved element by element. Planned: 32 registers,
// 64 warps on sm_80 and sm_90, 64 KB in flight. Bound by memory: sizeof(W) + sizeof(Out) bytes an
// element, each moved once, and 8 bytes of id a block; for one token by latency, which is that of
// two loads in a row. Called by csrc/bindings/embed.cpp.

#include "cuda/launch.h"
#include "cuda/pack.h"

namespace gemma2::cuda {
namespace {

constexpr int kThreads = 512;  // of a block, at most
constexpr int kPacks = 2;      // of a thread

template <typename W, typename Out, int kCount>
__global__ void __launch_bounds__(kThreads) embed_kernel(EmbedParams p) {
  const int64_t token = blockIdx.x, id = p.ids[token];
  if (id < 0 || id >= p.rows) {
    if (threadIdx.x == 0 && blockIdx.y == 0) GEMMA2_STOP("embed: an id is not a row of the table");
    return;
  }
  const W* row = static_cast<const W*>(p.weight) + id * p.weight_stride;
  Out* out = static_cast<Out*>(p.out) + token * p.hidden;
  const int64_t first = int64_t{blockIdx.y} * kPacks * blockDim.x + threadIdx.x;
  Pack<W, kCount> packs[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t i = (first + j * blockDim.x) * kCount;
    if (i < p.hidden) packs[j] = load_pack_once<kCount>(row + i);
  }
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t i = (first + j * blockDim.x) * kCount;
    if (i >= p.hidden) return;
    float scaled[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) scaled[e] = element(packs[j], e) * p.scale;
    store_pack(out + i, pack_of<Out>(scaled));
  }
}

template <typename W, typename Out, int kCount>
void run(const EmbedParams& p, CudaCall& call) {
  const int64_t packs = ceil_div(p.hidden, kCount);
  const int64_t parts = ceil_div(packs, kThreads * kPacks);  // of a row
  if (parts == 0) return;
  const int64_t threads = ceil_div(ceil_div(packs, parts * kPacks), kWarp) * kWarp;
  launch(call, "embed", embed_kernel<W, Out, kCount>, dim3(p.tokens, parts), threads, 0, p);
}

}  // namespace

void embed(const EmbedParams& p, CudaCall& call) {
  dispatch(p.weight_dtype, [&](auto w) {
    dispatch(p.out_dtype, [&](auto out) {
      using W = typename decltype(w)::type;
      using Out = typename decltype(out)::type;
      if (rows_of_16_bytes<W>(p.weight, p.weight_stride) &&
          rows_of_16_bytes<Out>(p.out, p.hidden) && p.hidden % pack_count<W, Out>() == 0)
        run<W, Out, pack_count<W, Out>()>(p, call);
      else
        run<W, Out, 1>(p, call);
    });
  });
}

}  // namespace gemma2::cuda
