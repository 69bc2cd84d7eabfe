// Where the candidates of a draw are: in registers, in scratch memory, in shared memory.
//
// source.each(f) calls f with each of the thread's elements, or with 0 for none.
#pragma once

#include "cuda/sample_scores.h"
#include "cuda/sample_select.h"

namespace gemma2::cuda::sampling {

constexpr int kListed = 8192;  // elements that the last launch holds in shared memory

// ---- Of a piece, in registers ----

// The thread's elements of a piece, and their keys; 0 for -infinity.
template <typename T>
struct InRegisters {
  const Scores<T>& scores;
  Columns<T> columns;
  Elements elements;

  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      f(scores.at[i] > -kInfinity ? elements.of(scores.at[i], columns(i)) : 0);
  }
};
template <typename T>
struct KeysInRegisters {
  const Scores<T>& scores;

  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) f(scores.at[i] > -kInfinity ? ordered(scores.at[i]) : 0u);
  }
};
// One key a thread.
struct OneKey {
  uint32_t key;

  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
    f(key);
  }
};

// Writes the elements >= bar, in the order of threads; gives how many.
template <typename T>
GEMMA2_DEVICE uint32_t write_elements(const InRegisters<T>& source, uint64_t bar, uint64_t* to,
                                      Team& team) {
  uint32_t mine = 0, n;
  source.each([&](uint64_t element) { mine += element >= bar; });
  uint32_t at = team.scan(mine, n);
  if (mine != 0)
    source.each([&](uint64_t element) {
      if (element >= bar) store(to + at++, element);
    });
  return n;
}

// ---- Of a row ----

// Elements in shared memory.
struct List {
  uint64_t* elements;
  uint32_t n;

  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) f(load(elements + i));
  }
};

// All candidates of a row in scratch; a warp takes piece by piece. Lanes of a warp call f together.
struct Pool {
  const Piece* pieces;
  const uint64_t* candidates;
  uint32_t count;  // of pieces

  GEMMA2_DEVICE Pool(const Plan& plan, int64_t row)
      : pieces(plan.pieces + row * plan.per_row),
        candidates(plan.candidates + row * plan.per_row * kSamplePiece),
        count(plan.per_row) {}

  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
    constexpr int kUnder = 4;  // loads under way
    for (uint32_t i = Team::warp(); i < count; i += Team::warps()) {
      const uint32_t n = load(&pieces[i].candidates);
      const uint64_t* at = candidates + int64_t{i} * kSamplePiece;
      for (uint32_t first = Team::lane(); first - Team::lane() < n; first += kUnder * kWarp) {
        uint64_t element[kUnder];
#pragma unroll
        for (int j = 0; j < kUnder; ++j)
          element[j] = first + j * kWarp < n ? load(at + first + j * kWarp) : 0;
#pragma unroll
        for (int j = 0; j < kUnder; ++j) f(element[j]);
      }
    }
  }
  GEMMA2_DEVICE uint64_t size(Team& team) const {
    uint64_t n = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) n += load(&pieces[i].candidates);
    return team.sum(n);
  }
};

// Elements in shared memory from the start.
struct Listed {
  List list;

  GEMMA2_DEVICE uint64_t cut_count(Cut<uint32_t> cut, const Elements& elements,
                                   Histograms& histograms) {
    while (!cut.done()) cut.step<false>(histograms, KeysOf<List>{list, elements}, One());
    return elements.least(cut.lo());
  }
  GEMMA2_DEVICE uint64_t cut_weight(Cut<uint64_t> cut, const Exponential& weigh,
                                    Histograms& histograms) {
    while (!cut.done()) cut.step<false>(histograms, list, weigh);
    return cut.lo();
  }
  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
    list.each(f);
  }
};

// Elements in scratch until few enough are left.
struct Pooled {
  Pool pool;
  List list;
  uint32_t& counter;  // in shared memory
  bool listed = false;

  // Moves the elements >= bar, of which there are n, if the list has room for them. Their order is
  // the scheduler's, but sums of integers and maxima are all that is made of them.
  GEMMA2_DEVICE void list_if_few(uint64_t bar, uint64_t n) {
    if (listed || n > kListed) return;
    if (threadIdx.x == 0) store(&counter, 0u);
    sync_block();
    pool.each([&](uint64_t element) {
      const unsigned taken = ballot(element >= bar);
      if (taken == 0) return;
      uint32_t at = 0;
      if (Team::lane() == 0) at = atomic_add(&counter, static_cast<uint32_t>(__popc(taken)));
      at = shuffle(at, 0) + __popc(taken & ((1u << Team::lane()) - 1));
      if (element >= bar) store(list.elements + at, element);
    });
    sync_block();
    list.n = load(&counter);
    listed = true;
  }

  GEMMA2_DEVICE uint64_t cut_count(Cut<uint32_t> cut, const Elements& elements,
                                   Histograms& histograms) {
    while (!cut.done()) {
      if (listed) {
        cut.step<false>(histograms, KeysOf<List>{list, elements}, One());
      } else {
        cut.step<true>(histograms, KeysOf<Pool>{pool, elements}, One());
        list_if_few(elements.least(cut.lo()), cut.at_least_lo());
      }
    }
    return elements.least(cut.lo());
  }
  GEMMA2_DEVICE uint64_t cut_weight(Cut<uint64_t> cut, const Exponential& weigh,
                                    Histograms& histograms) {
    while (!cut.done()) {
      if (listed) {
        cut.step<false>(histograms, list, weigh);
      } else {
        cut.step<true>(histograms, pool, weigh);
        list_if_few(cut.lo(), cut.at_least_lo());
      }
    }
    return cut.lo();
  }
  template <typename F>
  GEMMA2_DEVICE void each(const F& f) const {
    if (listed)
      list.each(f);
    else
      pool.each(f);
  }
};

}  // namespace gemma2::cuda::sampling
