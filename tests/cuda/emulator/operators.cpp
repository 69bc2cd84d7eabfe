// The operators on the emulator: what each call may read and write, to the byte, written from the
// operators' contracts and not from their kernels. The table that the tests install in place of the
// CPU's kernels.

#include <utility>

#include "common/mutate.h"
#include "cuda/emulator/runtime.h"
#include "cuda/kernels.h"

namespace gemma2::emulator {
namespace {

int64_t bytes_of(DType t) { return static_cast<int64_t>(size_of(t)); }

// Rows of n elements, `stride` elements apart.
void rows(const char* name, const void* p, int64_t count, int64_t n, int64_t stride, DType t,
          Access access) {
  add_region(name, p, n * bytes_of(t), {{count, stride * bytes_of(t)}}, access);
}
// [B, H, S, D]
void heads(const char* name, const void* p, int64_t batch, int64_t heads, int64_t length,
           int64_t dim, const Strides3& strides, DType t, Access access) {
  const int64_t size = bytes_of(t);
  add_region(name, p, dim * size,
             {{batch, strides.b * size}, {heads, strides.h * size}, {length, strides.s * size}},
             access);
}
void integers(const char* name, const int64_t* p, int64_t n) {
  add_region(name, p, n * 8, {}, Access::read);
}

// What kernels allocate becomes a region, while this lives.
class Working {
 public:
  explicit Working(CudaCall& call) : call_(call), owner_(call.owner), allocate_(call.allocate) {
    call.owner = this;
    call.allocate = [](void* owner, int64_t bytes) {
      const Working& self = *static_cast<Working*>(owner);
      void* p = self.allocate_(self.owner_, bytes);
      add_region("scratch", p, bytes, {}, Access::scratch);
      return p;
    };
  }
  ~Working() {
    call_.owner = owner_;
    call_.allocate = allocate_;
  }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  CudaCall& call_;
  void* owner_;
  void* (*allocate_)(void*, int64_t);
};

// The operator's launches with the regions added before; then nothing may be left unwritten.
template <typename Kernel>
void run(const char* name, CudaCall& call, const Kernel& kernel) {
  kernel(*gemma2_cuda_kernels());
  if (call.error == nullptr) call.error = check_written(name);
  clear_regions();
}

void embed(const EmbedParams& p, CudaCall& call) {
  clear_regions();
  integers("ids", p.ids, p.tokens);
  rows("weight", p.weight, p.rows, p.hidden, p.weight_stride, p.weight_dtype, Access::read);
  rows("out", p.out, p.tokens, p.hidden, p.hidden, p.out_dtype, Access::write);
  run("embed", call, [&](const CudaKernels& kernels) { kernels.embed(p, call); });
}

void rms_norm(const RmsNormParams& p, CudaCall& call) {
  clear_regions();
  rows("x", p.x, p.rows, p.hidden, p.x_stride, p.x_dtype, Access::read);
  rows("weight", p.weight, 1, p.hidden, 0, p.weight_dtype, Access::read);
  rows("out", p.out, p.rows, p.hidden, p.hidden, p.weight_dtype, Access::write);
  run("rms_norm", call, [&](const CudaKernels& kernels) { kernels.rms_norm(p, call); });
}

void add_rms_norm(const AddRmsNormParams& p, CudaCall& call) {
  clear_regions();
  const bool in_place = p.residual == p.residual_out;
  if (!in_place)
    rows("residual", p.residual, p.rows, p.hidden, p.hidden, p.residual_dtype, Access::read);
  rows("x", p.x, p.rows, p.hidden, p.x_stride, p.x_dtype, Access::read);
  rows("post_weight", p.post_weight, 1, p.hidden, 0, p.weight_dtype, Access::read);
  rows("pre_weight", p.pre_weight, 1, p.hidden, 0, p.weight_dtype, Access::read);
  rows("residual_out", p.residual_out, p.rows, p.hidden, p.hidden, p.residual_dtype,
       in_place ? Access::read_write : Access::write);
  rows("y", p.y, p.rows, p.hidden, p.hidden, p.weight_dtype, Access::write);
  run("add_rms_norm", call, [&](const CudaKernels& kernels) { kernels.add_rms_norm(p, call); });
}

void rope_regions(const RopeParams& p) {
  const int64_t half = p.head_dim / 2;
  heads("q", p.q, p.batch, p.q_heads, p.length, p.head_dim, p.q_strides, p.dtype, Access::read);
  heads("k", p.k, p.batch, p.kv_heads, p.length, p.head_dim, p.k_strides, p.dtype, Access::read);
  for (const auto& [name, table] : {std::pair{"cos", p.cos}, std::pair{"sin", p.sin}})
    add_region(
        name, table, half * 4,
        {{p.table_batch_stride == 0 ? 1 : p.batch, p.table_batch_stride * 4}, {p.length, half * 4}},
        Access::read);
  heads("q_out", p.q_out, p.batch, p.q_heads, p.length, p.head_dim, p.q_out_strides, p.dtype,
        Access::write);
  if (p.k_out != nullptr)
    heads("k_out", p.k_out, p.batch, p.kv_heads, p.length, p.head_dim, p.k_out_strides, p.dtype,
          Access::write);
}

void rope(const RopeParams& p, CudaCall& call) {
  clear_regions();
  rope_regions(p);
  run("rope", call, [&](const CudaKernels& kernels) { kernels.rope(p, call); });
}

void cache_regions(const CacheWriteParams& p, bool with_k) {
  if (with_k)
    heads("k", p.k, p.batch, p.kv_heads, p.length, p.head_dim, p.k_strides, p.dtype, Access::read);
  heads("v", p.v, p.batch, p.kv_heads, p.length, p.head_dim, p.v_strides, p.dtype, Access::read);
  heads("k_cache", p.k_cache, p.batch, p.kv_heads, p.capacity, p.head_dim, p.k_cache_strides,
        p.cache_dtype, Access::read_write);
  heads("v_cache", p.v_cache, p.batch, p.kv_heads, p.capacity, p.head_dim, p.v_cache_strides,
        p.cache_dtype, Access::read_write);
  integers("q_start", p.q_start, p.batch);
  integers("kv_len", p.kv_len, p.batch);
  integers("k_base", p.k_base, p.batch);
}

void cache_write(const CacheWriteParams& p, CudaCall& call) {
  clear_regions();
  cache_regions(p, true);
  run("cache_write", call, [&](const CudaKernels& kernels) { kernels.cache_write(p, call); });
}

void rope_cache(const RopeParams& p, const CacheWriteParams& cache, CudaCall& call) {
  clear_regions();
  rope_regions(p);
  cache_regions(cache, false);
  run("rope_cache", call, [&](const CudaKernels& kernels) { kernels.rope_cache(p, cache, call); });
}

void attention(const AttentionParams& p, CudaCall& call) {
  clear_regions();
  heads("q", p.q, p.batch, p.q_heads, p.q_length, p.head_dim, p.q_strides, p.q_dtype, Access::read);
  heads("k", p.k, p.batch, p.kv_heads, p.capacity, p.head_dim, p.k_strides, p.kv_dtype,
        Access::read);
  heads("v", p.v, p.batch, p.kv_heads, p.capacity, p.head_dim, p.v_strides, p.kv_dtype,
        Access::read);
  integers("q_start", p.q_start, p.batch);
  integers("kv_len", p.kv_len, p.batch);
  integers("kv_start", p.kv_start, p.batch * p.q_length);
  integers("k_base", p.k_base, p.batch);
  heads("out", p.out, p.batch, p.q_heads, p.q_length, p.head_dim, p.out_strides, p.q_dtype,
        Access::write);
  add_region("lse", p.lse, p.batch * p.q_heads * p.q_length * 4, {}, Access::write);
  const Working working(call);
  run("attention", call, [&](const CudaKernels& kernels) { kernels.attention(p, call); });
}

void geglu(const GegluParams& p, CudaCall& call) {
  clear_regions();
  rows("gate", p.gate, p.rows, p.width, p.gate_stride, p.dtype, Access::read);
  rows("up", p.up, p.rows, p.width, p.up_stride, p.dtype, Access::read);
  rows("out", p.out, p.rows, p.width, p.width, p.dtype, Access::write);
  run("geglu", call, [&](const CudaKernels& kernels) { kernels.geglu(p, call); });
}

void softcap(const SoftcapParams& p, CudaCall& call) {
  clear_regions();
  rows("x", p.x, 1, p.n, 0, p.dtype, Access::read);
  rows("out", p.out, 1, p.n, 0, p.dtype, Access::write);
  run("softcap", call, [&](const CudaKernels& kernels) { kernels.softcap(p, call); });
}

void linear(const LinearParams& p, CudaCall& call) {
  clear_regions();
  rows("x", p.x, p.m, p.k, p.x_stride, p.dtype, Access::read);
  rows("weight", p.weight, p.n, p.k, p.weight_stride, p.dtype, Access::read);
  rows("out", p.out, p.m, p.n, p.n, p.dtype, Access::write);
  run("linear", call, [&](const CudaKernels& kernels) { kernels.linear(p, call); });
}

void sample(const SampleParams& p, CudaCall& call) {
  clear_regions();
  rows("logits", p.logits, p.batch, p.vocab, p.logits_stride, p.dtype, Access::read);
  integers("history", p.history, p.batch * p.history_length);
  integers("step", p.step, p.step_stride == 0 ? 1 : (p.batch - 1) * p.step_stride + 1);
  add_region("out", p.out, p.batch * 8, {}, Access::write);
  const Working working(call);
  run("sample", call, [&](const CudaKernels& kernels) { kernels.sample(p, call); });
}

// Not constexpr: the kernels' own table says what exists.
CudaKernels emulated = {
    .embed = embed,
    .rms_norm = rms_norm,
    .add_rms_norm = add_rms_norm,
    .rope = rope,
    .cache_write = cache_write,
    .rope_cache = rope_cache,
    .attention = gemma2_cuda_kernels()->attention == nullptr ? nullptr : attention,
    .geglu = geglu,
    .softcap = softcap,
    .linear = nullptr,  // until asked for
    .sample = sample,
};

}  // namespace
}  // namespace gemma2::emulator

extern "C" const void* gemma2_emulated_kernels() { return &gemma2::emulator::emulated; }

// Dense products of a whole model take the emulator minutes: they are the CPU's but where a test is
// about them.
extern "C" void gemma2_emulate_linear(bool on) {
  gemma2::emulator::emulated.linear = on ? gemma2::emulator::linear : nullptr;
}
