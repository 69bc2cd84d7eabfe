// The kernels of one device, by operator. The CPU has a table per instruction set, CUDA one; a null
// entry is an operator without a kernel there.
#pragma once

#include "params/attention.h"
#include "params/cache_write.h"
#include "params/embed.h"
#include "params/geglu.h"
#include "params/linear.h"
#include "params/rms_norm.h"
#include "params/rope.h"
#include "params/sample.h"
#include "params/softcap.h"

namespace gemma2 {

// Context: what a call needs besides its operands (CUDA: the stream).
template <typename... Context>
struct KernelTable {
  void (*embed)(const EmbedParams&, Context...);
  void (*rms_norm)(const RmsNormParams&, Context...);
  void (*add_rms_norm)(const AddRmsNormParams&, Context...);
  void (*rope)(const RopeParams&, Context...);
  void (*cache_write)(const CacheWriteParams&, Context...);
  void (*rope_cache)(const RopeParams&, const CacheWriteParams&, Context...);
  void (*attention)(const AttentionParams&, Context...);
  void (*geglu)(const GegluParams&, Context...);
  void (*softcap)(const SoftcapParams&, Context...);
  void (*linear)(const LinearParams&, Context...);
  void (*sample)(const SampleParams&, Context...);
};

}  // namespace gemma2
