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
};

#ifdef GEMMA2_TEST_MUTATIONS
extern const Mutation active_mutation;
static inline bool mutated(Mutation m) { return active_mutation == m; }
#else
static constexpr bool mutated(Mutation) { return false; }
#endif

}  // namespace gemma2
