// Selection among the scored columns of a row by one block, without sorting: the k-th largest, or
// the end of the shortest run of largest ones with a given weight.
//
// An element is a column with its score in one integer that orders elements by score and, of equal
// scores, by column. What is kept is always "all elements >= a bar"; a bar is found by narrowing
// the interval that contains it, one histogram of 128 bins a step: the first by the distance from
// the largest score in key space, four bins an octave, which suits any scale; the next by equal
// parts. Mostly two or three steps.
//
// Weights are integers, and made from scores by integer arithmetic, so sums depend neither on the
// order of additions (atomics serve) nor on the device.
#pragma once

#include "cuda/ptx.h"

namespace gemma2::cuda::sampling {

constexpr float kInfinity = __builtin_inff();

// ---- Elements ----

// Floats as integers of the same order; -0 is +0.
GEMMA2_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
GEMMA2_DEVICE float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

constexpr uint32_t kAnyKey = 1;  // not above the key of any number

GEMMA2_DEVICE int bit_length(uint32_t x) { return 32 - __clz(static_cast<int>(x)); }
GEMMA2_DEVICE int bit_length(uint64_t x) {
  const uint32_t high = static_cast<uint32_t>(x >> 32);
  return high != 0 ? 32 + bit_length(high) : bit_length(static_cast<uint32_t>(x));
}

// Elements of a row with at most 2^column_bits columns; 0 is no element.
struct Elements {
  int column_bits;

  GEMMA2_DEVICE uint64_t of(float score, uint32_t column) const {
    return uint64_t{ordered(score)} << column_bits | column;
  }
  GEMMA2_DEVICE uint32_t key(uint64_t element) const {
    return static_cast<uint32_t>(element >> column_bits);
  }
  GEMMA2_DEVICE float score(uint64_t element) const { return from_ordered(key(element)); }
  GEMMA2_DEVICE uint32_t column(uint64_t element) const {
    return static_cast<uint32_t>(element & ((uint64_t{1} << column_bits) - 1));
  }
  // The least and the largest element of a key.
  GEMMA2_DEVICE uint64_t least(uint32_t key) const { return uint64_t{key} << column_bits; }
  GEMMA2_DEVICE uint64_t largest(uint32_t key) const {
    return least(key) | ((uint64_t{1} << column_bits) - 1);
  }
};

// ---- Weights ----

struct One {};

// exp(score - largest) in units of 2^(column_bits - 62), so that a row's sum stays below 2^62;
// smaller than a unit is 0. Relative error below 3e-9, and the same bits everywhere:
//   d = largest - score = m 2^(e - 150),  y = d log2(e) in fixed point with 57 bits behind the
//   point, exp(-d) = 2^-y = 2^g / 2^n,  n = ceil(y),  g = n - y, 2^g - 1 = g q(g), q of degree 6 in
//   32-bit fixed point (interpolated at Chebyshev's points: 9e-10)
struct Exponential {
  Elements elements;
  float largest;

  // 1 in these units.
  GEMMA2_DEVICE uint64_t unit() const { return uint64_t{1} << (62 - elements.column_bits); }

  GEMMA2_DEVICE uint64_t operator()(uint64_t element) const {
    const float d = largest - elements.score(element);
    if (!(d < 43.0f)) return 0;  // e^-43 < 2^-62
    const uint32_t bits = __float_as_uint(d);
    const int exponent = static_cast<int>(bits >> 23);
    const uint64_t product = uint64_t{(bits & 0x7fffffu) | 0x800000u} * 0xb8aa3b29u;
    uint64_t y = 0;
    if (exponent >= 124)
      y = product << (exponent - 124);
    else if (exponent > 60)
      y = product >> (124 - exponent);
    const int64_t negative = -static_cast<int64_t>(y);
    const int n = static_cast<int>(-(negative >> 57));
    const uint32_t g = static_cast<uint32_t>(negative >> 25);
    uint32_t q = 89043u;
    q = 627479u + __umulhi(q, g);
    q = 5750554u + __umulhi(q, g);
    q = 41301092u + __umulhi(q, g);
    q = 238389752u + __umulhi(q, g);
    q = 1031764902u + __umulhi(q, g);
    q = 2977044473u + __umulhi(q, g);
    const uint64_t power = (uint64_t{1} << 62) + (uint64_t{__umulhi(q, g)} << 30);
    const int shift = elements.column_bits + n;
    return shift < 64 ? power >> shift : 0;
  }
};

// ---- Over the block ----

// Reductions and a scan; blocks are one-dimensional, of full warps. Shared memory is used in turns:
// what is written for one is read before the barrier of the next, and overwritten behind it.
class Team {
 public:
  struct Shared {
    uint64_t whole[2][kWarp];
    double real[2][kWarp];
    uint32_t count[2][kWarp];
  };
  GEMMA2_DEVICE explicit Team(Shared& shared) : shared_(shared) {}

  GEMMA2_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  GEMMA2_DEVICE static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  GEMMA2_DEVICE static int warps() { return static_cast<int>(blockDim.x) / kWarp; }

  GEMMA2_DEVICE uint64_t largest(uint64_t v) {
    return reduce(v, shared_.whole[turn()], [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }
  GEMMA2_DEVICE uint64_t sum(uint64_t v) {
    return reduce(v, shared_.whole[turn()], [](uint64_t a, uint64_t b) { return a + b; });
  }
  // In an order that depends on nothing but the block's size.
  GEMMA2_DEVICE double sum(double v) {
    return reduce(v, shared_.real[turn()], [](double a, double b) { return a + b; });
  }
  // Sum of the counts of the threads before this one, and of all.
  GEMMA2_DEVICE uint32_t scan(uint32_t count, uint32_t& total) {
    uint32_t upto = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t other = shuffle_up(upto, step);
      upto += lane() >= step ? other : 0;
    }
    uint32_t* slots = shared_.count[turn()];
    total = shuffle(upto, kWarp - 1);
    if (warps() == 1) return upto - count;
    if (lane() == 0) store(slots + warp(), total);
    sync_block();
    uint32_t before = 0;
    total = 0;
    for (int w = 0; w < warps(); ++w) {
      const uint32_t of_warp = load(slots + w);
      before += w < warp() ? of_warp : 0;
      total += of_warp;
    }
    return before + upto - count;
  }

 private:
  GEMMA2_DEVICE int turn() { return turn_ ^= 1; }

  template <typename T, typename Op>
  GEMMA2_DEVICE T reduce(T v, T* slots, const Op& op) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) v = op(v, shuffle_xor(v, bits));
    if (warps() == 1) return v;
    if (lane() == 0) store(slots + warp(), v);
    sync_block();
    v = lane() < warps() ? load(slots + lane()) : T{0};
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) v = op(v, shuffle_xor(v, bits));
    return v;
  }

  Shared& shared_;
  int turn_ = 0;
};

// ---- The search ----

constexpr int kBins = 4 * kWarp;  // a lane reads its four of each kind in one access

// Histograms in turns of three, so that a step has one barrier: it counts in one, clears the next,
// and slower warps may still read the one before.
class Histograms {
 public:
  struct alignas(16) Bins {
    uint32_t count[kBins];
    uint32_t low[kBins], high[kBins];  // halves of the sum of weights
  };
  struct Shared {
    Bins bins[3];
  };
  // Threads meet in here.
  GEMMA2_DEVICE explicit Histograms(Shared& shared) : shared_(shared) {
    clear(shared_.bins[0]);
    sync_block();
  }
  // The bins of this step, cleared.
  GEMMA2_DEVICE Bins& take() {
    Bins& bins = shared_.bins[turn_];
    turn_ = turn_ == 2 ? 0 : turn_ + 1;
    clear(shared_.bins[turn_]);
    return bins;
  }

 private:
  GEMMA2_DEVICE static void clear(Bins& bins) {
    uint4* at = reinterpret_cast<uint4*>(bins.count);
    for (uint32_t i = threadIdx.x; i < sizeof(Bins) / 16; i += blockDim.x)
      store(at + i, make_uint4(0, 0, 0, 0));
  }

  Shared& shared_;
  int turn_ = 0;
};

// Distances by octave, each in four parts: 0, 1, 2, 3, 4, 5, 6, 7, 8-9, 10-11, ...; below 124.
GEMMA2_DEVICE uint32_t octave_bin(uint32_t distance) {
  if (distance < 4) return distance;
  const int length = bit_length(distance);
  return static_cast<uint32_t>(length - 2) * 4 + (distance >> (length - 3) & 3);
}
GEMMA2_DEVICE uint32_t octave_first(uint32_t bin) {
  return bin < 4 ? bin : (4 + bin % 4) << (bin / 4 - 1);
}
GEMMA2_DEVICE uint32_t octave_last(uint32_t bin) {
  return bin < 4 ? bin : octave_first(bin) + ((1u << (bin / 4 - 1)) - 1);
}

// The bar such that the elements >= it are the fewest that weigh `target` or more: lo(), once done.
// All threads hold the same state. Element is uint32_t, a key, and weights are 1; or uint64_t, a
// key with a column, and weights are of 64 bits.
template <typename Element>
class Cut {
 public:
  static constexpr bool kWeighted = sizeof(Element) == 8;

  // `floor`: only elements >= it count, and it is not 0. `share`: the target is this share of the
  // weight of all of them.
  GEMMA2_DEVICE Cut(Element floor, Element largest, Element target, double share = 0.0,
                    int column_bits = 0)
      : lo_(floor), hi_(largest), target_(target), share_(share), column_bits_(column_bits) {}

  GEMMA2_DEVICE bool done() const { return done_; }
  // Not above the bar. If even all elements >= floor weigh less than wanted, floor.
  GEMMA2_DEVICE Element lo() const { return lo_; }
  // How many elements are >= lo(); only after steps with kCountAbove.
  GEMMA2_DEVICE uint32_t at_least_lo() const { return above_ + inside_; }

  // source.each(f) gives f each of the thread's elements, or 0 for none.
  template <bool kCountAbove, typename Source, typename Weight>
  GEMMA2_DEVICE void step(Histograms& histograms, const Source& source, const Weight& weigh) {
    Histograms::Bins& bins = histograms.take();
    const int shift = max(0, bit_length(static_cast<Element>(hi_ - lo_)) - 7);
    source.each([&](Element element) {
      if (element < lo_ || element > hi_) return;
      const uint32_t bin = first_ ? octave_bin(key(hi_) - key(element))
                                  : static_cast<uint32_t>((hi_ - element) >> shift);
      atomic_add(&bins.count[bin], 1u);
      if constexpr (kWeighted) {
        const uint64_t weight = weigh(element);
        const uint32_t low = static_cast<uint32_t>(weight);
        const uint32_t sum = atomic_add(&bins.low[bin], low) + low;
        const uint32_t high = static_cast<uint32_t>(weight >> 32) + (sum < low ? 1 : 0);
        if (high != 0) atomic_add(&bins.high[bin], high);
      }
    });
    sync_block();

    // Every warp finds the bin for itself.
    const int lane = Team::lane();
    const uint4 count = load(reinterpret_cast<const uint4*>(bins.count) + lane);
    const uint32_t counts[4] = {count.x, count.y, count.z, count.w};
    Element weights[4] = {count.x, count.y, count.z, count.w};
    if constexpr (kWeighted) {
      const uint4 low = load(reinterpret_cast<const uint4*>(bins.low) + lane);
      const uint4 high = load(reinterpret_cast<const uint4*>(bins.high) + lane);
      weights[0] = uint64_t{high.x} << 32 | low.x;
      weights[1] = uint64_t{high.y} << 32 | low.y;
      weights[2] = uint64_t{high.z} << 32 | low.z;
      weights[3] = uint64_t{high.w} << 32 | low.w;
    }
    const Element own = weights[0] + weights[1] + weights[2] + weights[3];
    const Element upto = scan(own);
    if constexpr (kWeighted)
      if (target_ == 0) target_ = share_of(shuffle(upto, kWarp - 1));
    const unsigned reached = ballot(upto >= target_);
    if (reached == 0) {  // only in the first step
      done_ = true;
      if constexpr (kCountAbove)
        inside_ = shuffle(scan(counts[0] + counts[1] + counts[2] + counts[3]), kWarp - 1);
      return;
    }
    Element before = upto - own;
    uint32_t part = 0, before_count = 0;
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i)
      if (part == i && before + weights[i] < target_) {
        before += weights[i];
        before_count += counts[i];
        part = i + 1;
      }
    const Element weight =
        part < 2 ? (part == 0 ? weights[0] : weights[1]) : (part == 2 ? weights[2] : weights[3]);
    const uint32_t inside =
        part < 2 ? (part == 0 ? counts[0] : counts[1]) : (part == 2 ? counts[2] : counts[3]);
    // In a bin of one element it is the one; in a bin that is wanted whole, its end is the bar.
    const bool last = inside == 1 || before + weight == target_;

    const int from = __ffs(static_cast<int>(reached)) - 1;
    const uint32_t found = shuffle(part | (last ? 4u : 0u), from);
    target_ -= shuffle(before, from);
    if constexpr (kCountAbove) {
      const uint32_t n = counts[0] + counts[1] + counts[2] + counts[3];
      above_ += shuffle(scan(n) - n + before_count, from);
      inside_ = shuffle(inside, from);
    }
    narrow(static_cast<uint32_t>(from) * 4 + (found & 3), shift);
    done_ = (found & 4) != 0 || hi_ == lo_;
  }

 private:
  GEMMA2_DEVICE uint32_t key(Element element) const {
    return static_cast<uint32_t>(element >> column_bits_);
  }

  // The sum over this and all lower lanes.
  template <typename T>
  GEMMA2_DEVICE static T scan(T v) {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const T other = shuffle_up(v, step);
      v += Team::lane() >= step ? other : 0;
    }
    return v;
  }

  // Elements are kept while those before them weigh less than share * total.
  GEMMA2_DEVICE Element share_of(Element total) const {
    const double wanted = share_ * static_cast<double>(total);
    Element least = static_cast<Element>(wanted);
    if (static_cast<double>(least) < wanted) ++least;
    return max(Element{1}, min(least, total));
  }

  // [lo, hi] becomes its bin number `bin`.
  GEMMA2_DEVICE void narrow(uint32_t bin, int shift) {
    if (first_) {
      first_ = false;
      const uint32_t top = key(hi_), end = octave_last(bin);
      const Element columns = (Element{1} << column_bits_) - 1;
      hi_ = static_cast<Element>(top - octave_first(bin)) << column_bits_ | columns;
      if (end <= top) lo_ = max(lo_, static_cast<Element>(top - end) << column_bits_);
    } else {
      hi_ -= static_cast<Element>(bin) << shift;
      const Element width = (Element{1} << shift) - 1;
      if (width < hi_ - lo_) lo_ = hi_ - width;
    }
  }

  Element lo_, hi_;
  Element target_;  // of the weight in [lo, hi]; 0: a share of all, not known yet
  double share_;
  int column_bits_;
  bool first_ = true, done_ = false;
  uint32_t above_ = 0, inside_ = 0;  // elements above hi; in [lo, hi]
};

// Keys of a source's elements.
template <typename Source>
struct KeysOf {
  const Source& source;
  Elements elements;

  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
    source.each([&](uint64_t element) { f(elements.key(element)); });
  }
};

}  // namespace gemma2::cuda::sampling
