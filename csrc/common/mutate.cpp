#include "common/mutate.h"

#ifdef GEMMA2_TEST_MUTATIONS

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gemma2 {
namespace {

struct Named {
  const char* name;
  Mutation mutation;
};
constexpr Named kNames[] = {
    {"", Mutation::none},
    {"cap_dropped", Mutation::cap_dropped},
    {"logits_cap_dropped", Mutation::logits_cap_dropped},
    {"window_off_by_one", Mutation::window_off_by_one},
    {"norm_without_one", Mutation::norm_without_one},
    {"embed_unrounded", Mutation::embed_unrounded},
    {"ring_slot_shifted", Mutation::ring_slot_shifted},
    {"future_visible", Mutation::future_visible},
    {"documents_ignored", Mutation::documents_ignored},
    {"ring_slot_misread", Mutation::ring_slot_misread},
    {"groups_interleaved", Mutation::groups_interleaved},
    {"split_left_out", Mutation::split_left_out},
    {"splits_unweighted", Mutation::splits_unweighted},
    {"lse_from_rounded", Mutation::lse_from_rounded},
    {"lse_without_maximum", Mutation::lse_without_maximum},
    {"waits_too_little", Mutation::waits_too_little},
};

Mutation of_environment() {
  const char* name = std::getenv("GEMMA2_MUTATE");
  return mutation_named(name == nullptr ? "" : name);
}

}  // namespace

Mutation mutation_named(const char* name) {
  for (const Named& named : kNames)
    if (std::string(named.name) == name) return named.mutation;
  throw std::invalid_argument(std::string("GEMMA2_MUTATE: no mutation is named '") + name + "'");
}

Mutation active_mutation = of_environment();

}  // namespace gemma2

#endif
