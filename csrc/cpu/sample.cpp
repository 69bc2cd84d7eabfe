// sample: repetition penalty, temperature, top-k, top-p, min-p, then the Gumbel-max draw
// argmax_i(x_i - log(-log(u_i))), with u_i from common/philox.h.
//
// A row's logits are read once, into 1 MB of float32 that stays in the cache. top-k, top-p and min-p are each
// one threshold on the logits: the first two are found by refining a histogram over the bits of the
// logits, counting tokens or summing probabilities, so nothing is sorted; what equals a threshold is kept.
// The draw skips groups of tokens in which none is left. Rows run in parallel; one row of 256,000 takes a few
// milliseconds, mostly for the draw, beside 150 for a decode step of the 2B model.
// Called by gemma2/ops/sample.py; reference: gemma2/reference.py.

#include "common/philox.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

typedef uint64_t vu64 __attribute__((vector_size(kLanes * 8)));

constexpr float kInf = __builtin_inff();

// Integers in the order of the floats.
inline uint32_t sortable(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
inline float from_sortable(uint32_t key) {
  const uint32_t bits = key & 0x80000000 ? key & 0x7fffffff : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The largest t such that the weights of the x >= t sum to at least `wanted`; -inf if all do not.
// Three rounds over 11, 11 and 10 bits, each within the bin that the one before has found.
template <typename Weight>
float threshold(const float* x, int64_t n, double wanted, const Weight& weight) {
  constexpr int kShift[] = {21, 10, 0}, kBits[] = {11, 11, 10};
  uint32_t prefix = 0, known = 0;  // bits found so far, and their mask
  double above = 0;
  for (int round = 0; round < 3; ++round) {
    double bins[1 << 11] = {};
    const uint32_t bin_mask = (1u << kBits[round]) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = sortable(x[i]);
      if ((key & known) == prefix) bins[key >> kShift[round] & bin_mask] += weight(i);
    }
    int64_t bin = bin_mask;
    for (; bin >= 0; --bin) {
      if (above + bins[bin] >= wanted) break;
      above += bins[bin];
    }
    if (bin < 0) return -kInf;  // rounding: the sum of all falls just short
    prefix |= (uint32_t)bin << kShift[round];
    known |= bin_mask << kShift[round];
  }
  return from_sortable(prefix);
}

inline void mulhilo(uint32_t a, vu32 b, vu32* hi, vu32* lo) {
  const vu64 product = __builtin_convertvector(b, vu64) * (uint64_t)a;
  *hi = __builtin_convertvector(product >> 32, vu32);
  *lo = __builtin_convertvector(product, vu32);
}

// argmax of x_i + Gumbel noise over x_i >= least; the first of ties.
int64_t draw(const float* x, int64_t n, float least, const SampleParams& p, int64_t row) {
  int64_t best_index = -1;
  float best = -kInf;
  vu32 lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  float noisy[4 * kLanes];
  for (int64_t first = 0; first < n; first += 4 * kLanes) {
    const int64_t count = min64(4 * kLanes, n - first);
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= x[first + i] >= least;
    if (!any) continue;
    vu32 c[4] = {lane + (uint32_t)(first / 4), vu32{} + (uint32_t)row, vu32{} + (uint32_t)p.step,
                 vu32{} + (uint32_t)(p.step >> 32)};
    philox4x32_10(c, (uint32_t)p.seed, (uint32_t)(p.seed >> 32), mulhilo);
    for (int word = 0; word < 4; ++word) {
      const vf32 integer = __builtin_convertvector((vi32)(c[word] >> kUniformShift), vf32);
      const vf32 u = (integer + 0.5f) * kUniformScale;
      float gumbel[kLanes];
      store(gumbel, -log(-log(u)));
      for (int i = 0; i < kLanes; ++i) noisy[4 * i + word] = gumbel[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const float value = x[first + i] + noisy[i];
      if (x[first + i] >= least && value > best) {
        best = value;
        best_index = first + i;
      }
    }
  }
  return best_index;
}

template <typename T>
int64_t sample_row(const SampleParams& p, int64_t row, float* x, float* weight) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const int64_t n = p.vocab;
  for_lanes(n, [&](int64_t i, int64_t lanes) { store_upto(x + i, load_upto(logits + i, lanes), lanes); });

  if (p.history != nullptr && p.repetition_penalty != 1.0f) {
    for (int64_t i = 0; i < p.history_length; ++i) {
      const int64_t token = p.history[row * p.history_length + i];
      if (token < 0) continue;
      const float logit = load_one(logits + token);  // not x: a token occurs more than once
      x[token] = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
    }
  }

  float best = -kInf;
  int64_t best_index = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (!(x[i] < kInf)) return kSampleNotFinite;
    if (x[i] > best) {
      best = x[i];
      best_index = i;
    }
  }
  if (best_index < 0) return kSampleNothingLeft;
  if (p.temperature == 0) return best_index;

  // From here on x is relative to the largest logit.
  const float inverse = 1.0f / p.temperature;
  for_lanes(n, [&](int64_t i, int64_t lanes) {
    store_upto(x + i, (load_upto(x + i, lanes) - best) * inverse, lanes);
  });
  float least = -3.4028235e38f;  // not -inf: what was masked out is never drawn
  if (p.top_k > 0 && p.top_k < n) {
    const float t = threshold(x, n, (double)p.top_k, [](int64_t) { return 1.0; });
    if (t > least) least = t;
  }
  if (p.top_p < 1) {
    double total = 0;
    for_lanes(n, [&](int64_t i, int64_t lanes) {
      const vf32 v = load_upto(x + i, lanes);
      store_upto(weight + i, v >= least ? exp(v) : vf32{}, lanes);
    });
    for (int64_t i = 0; i < n; ++i) total += weight[i];
    const float t = threshold(x, n, p.top_p * total, [&](int64_t i) { return (double)weight[i]; });
    if (t > least) least = t;
  }
  if (p.min_p > 0) {
    const float t = log(splat(p.min_p))[0];
    if (t > least) least = t;
  }
  return draw(x, n, least < 0 ? least : 0, p, row);
}

}  // namespace

void sample(const SampleParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(p.batch, 1, [&](int64_t begin, int64_t end) {
      const Scratch x(p.vocab), weight(p.top_p < 1 ? p.vocab : 1);
      for (int64_t row = begin; row < end; ++row)
        p.out[row] = sample_row<T>(p, row, x.get(), weight.get());
    });
  });
}

}  // namespace gemma2::GEMMA2_ISA
