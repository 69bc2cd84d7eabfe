// Deliberate faults for the test of the tests: built only with GEMMA2_TEST_MUTATIONS, switched on
// by the environment variable GEMMA2_MUTATE=<name>. In a normal build every question below is a
// constant `false`.
#pragma once

namespace gemma2 {

enum class Mutation : int {
  none,
  cap_dropped,         // attention scores are not capped
  logits_cap_dropped,  // the logits are not capped
  window_off_by_one,   // the window shows one token more
  norm_without_one,    // w instead of 1 + w
  embed_unrounded,     // sqrt(hidden) not rounded to the weight's dtype
  ring_slot_shifted,   // keys are written one slot too far
  future_visible,      // j <= p + 1
  documents_ignored,   // a query sees the documents before its own
  // Of the CUDA kernels:
  ring_slot_misread,    // keys are read one slot too far
  groups_interleaved,   // query head h has the keys of head h mod kv_heads
  split_left_out,       // decode forgets the last of several splits
  splits_unweighted,    // decode adds splits as if their maxima were the same
  lse_from_rounded,     // log-sum-exp from the rounded probabilities
  lse_without_maximum,  // and without what their exponents are relative to
  waits_too_little,     // one group of copies more may be under way (tests/cuda/emulator)
};

#ifdef GEMMA2_TEST_MUTATIONS
extern Mutation active_mutation;
Mutation mutation_named(const char* name);  // "": none; throws where there is no such one
static inline bool mutated(Mutation m) { return active_mutation == m; }
#else
static constexpr bool mutated(Mutation) { return false; }
#endif

}  // namespace gemma2
