// Every operator of the package, as torch sees it: `torch.ops.gemma2.*`. Schemas only; the meaning
// of each is in gemma2/ops/<name>.py, its plain form in gemma2/reference.py, its kernel in
// csrc/cpu/<name>.cpp.
//
// Shapes: B batch, S query columns, H heads, D head_dim, C cache slots, V vocabulary.
// Operators whose schema has Tensor(a!) write in place, are for inference, and have a functional
// twin.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gemma2, m) {
  m.def("embed(Tensor ids, Tensor weight, float scale) -> Tensor");

  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "add_rms_norm(Tensor residual, Tensor x, Tensor post_weight, Tensor pre_weight, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_(Tensor(a!) residual, Tensor x, Tensor post_weight, Tensor pre_weight,"
      " float eps) -> Tensor");

  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
  m.def(
      "cache_write(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor q_start,"
      " Tensor kv_len, Tensor? k_base=None) -> ()");
  m.def(
      "rope_cache(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache,"
      " Tensor(b!) v_cache, Tensor q_start, Tensor kv_len, Tensor? k_base=None) -> Tensor");

  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor q_start, Tensor kv_len,"
      " Tensor? kv_start=None, Tensor? k_base=None, Tensor? k_scale=None, Tensor? v_scale=None, *,"
      " float scale, float softcap=0., int window=0, bool deterministic=False)"
      " -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
      " Tensor q_start, Tensor kv_len, Tensor? kv_start=None, Tensor? k_base=None, *,"
      " float scale, float softcap=0., int window=0) -> (Tensor, Tensor, Tensor)");

  m.def("geglu(Tensor gate, Tensor up) -> Tensor");
  m.def("softcap(Tensor x, float cap) -> Tensor");
  m.def("linear(Tensor x, Tensor weight) -> Tensor");

  m.def(
      "sample(Tensor logits, Tensor? history, int seed, Tensor step, float temperature=1.,"
      " int top_k=0, float top_p=1., float min_p=0., float repetition_penalty=1.) -> Tensor");
}
