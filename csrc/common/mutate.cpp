#include "common/mutate.h"

#ifdef GEMMA2_TEST_MUTATIONS

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gemma2 {
namespace {

Mutation read_mutation() {
  const char* value = std::getenv("GEMMA2_MUTATE");
  const std::string name = value == nullptr ? "" : value;
  if (name.empty()) return Mutation::none;
  if (name == "cap_dropped") return Mutation::cap_dropped;
  if (name == "logits_cap_dropped") return Mutation::logits_cap_dropped;
  if (name == "window_off_by_one") return Mutation::window_off_by_one;
  if (name == "norm_without_one") return Mutation::norm_without_one;
  if (name == "embed_unrounded") return Mutation::embed_unrounded;
  if (name == "ring_slot_shifted") return Mutation::ring_slot_shifted;
  if (name == "future_visible") return Mutation::future_visible;
  throw std::invalid_argument("GEMMA2_MUTATE: no mutation is named '" + name + "'");
}

}  // namespace

const Mutation active_mutation = read_mutation();

}  // namespace gemma2

#endif
