// sample: penalty, temperature, top-k, top-p, min-p, then argmax(score + Gumbel), one token a row.
//
// A row is cut into pieces of 4096 columns: 256 threads, 16 columns each, read 16 bytes at a time
// and kept in registers, so a piece is read once whatever is asked of it. Blocks of a launch know
// nothing of each other; what pieces find lies in scratch memory for the next launch.
//
//   greedy, temperature  1. pieces: argmax
//                        2. rows: argmax of the pieces' best
//   top-k                1. pieces: the columns that reach the piece's own k-th largest, or a few
//                           more
//                        2. rows: cut, draw
//   top-p, min-p         1. pieces: maximum and sum of exponentials
//                        2. pieces: the columns that can be in the set. Those less likely than
//                           (1 - top_p) / V have less than 1 - top_p together: none of them is
//                        3. rows: cut, draw
//
// A row of one piece takes one launch, no scratch and as few threads as hold it, down to a warp.
// Cuts: sample_select.h. Scratch has room for all columns as candidates. The last launch, a block
// of 1024 threads a row, moves them into shared memory as soon as at most 8192 are left: from the
// start with k = 50 and V = 256000 (about 3500), else mostly after one step over all of them.
// Nothing is assumed about logits but that they are numbers: pieces subtract maxima of their own.
//
// Bytes: V sizeof(T) a row and read, 2 reads for top-p and min-p without top-k, else 1; 8 for a
// candidate, written once and read two to four times (L2). V = 256000 is 63 blocks a row. Up to 64
// registers a thread (80 in two kernels) let 4 (3) blocks run on a multiprocessor, each with 8 KB
// under way from its start (float32: 16 KB).
//
// What bounds it, with many rows: memory for greedy, top-k and top-p; arithmetic for temperature,
// with about 30 instructions a column (Philox serves four; only columns whose Gumbel number may be
// the largest get logarithms) and 10 for the division where the temperature is not 1. With one row:
// the latency of two or three launches, whose blocks have 8 KB to read.
//
// History: every block reads the row's and marks its piece's columns in 512 bytes of shared memory.
// Marks of the whole row in scratch would cost a launch more, to clear and to set them. This way a
// history of L tokens costs L / 2048 waits for memory; its bytes outweigh a block's 16-bit logits
// from L = 1024 on, but come from L2 for all blocks of a row but one.
//
// Called by csrc/bindings/sample.cpp; reference: gemma2/reference.py.

#include "cuda/launch.h"
#include "cuda/sample_candidates.h"
#include "cuda/sample_scores.h"
#include "cuda/sample_select.h"

namespace gemma2::cuda {
namespace {

using namespace sampling;

constexpr int kBestThreads = 64;  // combine the pieces' best
constexpr int kChooseThreads = 1024;

static_assert(kPieceThreads == 256, "what the plan above says");

inline GEMMA2_HOST_DEVICE bool keeps_top_k(const SampleParams& p) {
  return p.top_k > 0 && p.top_k < p.vocab;
}
// The least score that min-p keeps.
GEMMA2_DEVICE float least_of_min_p(const SampleParams& p, float largest) {
  return largest + logf(static_cast<float>(p.min_p));
}

// ---- Launch 1: argmax ----

template <typename T>
GEMMA2_DEVICE uint64_t best_score(const Scores<T>& scores, const Columns<T>& columns) {
  float best = -kInfinity;
  uint32_t column = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (scores.at[i] > best) {
      best = scores.at[i];
      column = columns(i);
    }
  return ranked(best, column);
}

// Score + Gumbel. Exact are, of each thread, the column with the largest bound, and then those
// whose bound is not below the largest exact number of the warp: one or two a warp. Rounding is
// monotonic, so a sum of bounds bounds the sum.
template <typename T>
GEMMA2_DEVICE uint64_t best_draw(const Scores<T>& scores, const Columns<T>& columns, uint32_t vocab,
                                 const Random& random) {
  float bound[kColumns];
  float top = -kInfinity, top_score = 0.0f;
  uint32_t top_column = 0;
#pragma unroll
  for (int q = 0; q < kColumns; q += 4) {
    if (columns(q) >= vocab) {
#pragma unroll
      for (int i = 0; i < 4; ++i) bound[q + i] = -kInfinity;
      continue;
    }
    const Words w = random.words(columns(q));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bound[q + i] = scores.at[q + i] + gumbel_bound(w.of[i]);
      if (bound[q + i] > top) {
        top = bound[q + i];
        top_score = scores.at[q + i];
        top_column = columns(q + i);
      }
    }
  }
  float bar = -kInfinity;
  if (top > -kInfinity) bar = top_score + gumbel(random.word(top_column));
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) bar = fmaxf(bar, shuffle_xor(bar, bits));

  float best = -kInfinity;
  uint32_t column = 0;
  if (bar > -kInfinity && top >= bar) {
#pragma unroll
    for (int q = 0; q < kColumns; q += 4) {
      if (!(bound[q] >= bar || bound[q + 1] >= bar || bound[q + 2] >= bar || bound[q + 3] >= bar))
        continue;
      const Words w = random.words(columns(q));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(bound[q + i] >= bar)) continue;
        const float drawn = scores.at[q + i] + gumbel(w.of[i]);
        if (drawn > best) {
          best = drawn;
          column = columns(q + i);
        }
      }
    }
  }
  return ranked(best, column);
}

struct PieceShared {
  Marks marks;
  Team::Shared team;
};

template <typename T, bool kRandom>
__global__ void __launch_bounds__(kPieceThreads, 4) best_kernel(SampleParams p, Plan plan) {
  PieceShared& shared = static_shared<PieceShared>();
  Team team(shared.team);
  const Place place(plan);
  const Columns<T> columns = {place.begin};
  Scores<T> scores;
  const bool ok = scores.from(Packs<T>(p, plan, place), p, place, shared.marks);
  uint64_t best;
  if constexpr (kRandom)
    best = best_draw(scores, columns, static_cast<uint32_t>(p.vocab), Random(p, place.row));
  else
    best = best_score(scores, columns);
  best = team.largest(ok ? best : kBad);
  if (threadIdx.x != 0) return;
  if (plan.per_row == 1)
    store(p.out + place.row, token_of(best));
  else
    store(&plan.pieces[blockIdx.x].best, best);
}

// The best of a row's pieces. Threads meet in here.
GEMMA2_DEVICE uint64_t best_of_row(const Plan& plan, int64_t row, Team& team) {
  uint64_t best = 0;
  for (uint32_t i = threadIdx.x; i < plan.per_row; i += blockDim.x) {
    const uint64_t of_piece = load(&plan.pieces[row * plan.per_row + i].best);
    best = of_piece > best ? of_piece : best;
  }
  return team.largest(best);
}

__global__ void __launch_bounds__(kBestThreads) best_row_kernel(SampleParams p, Plan plan) {
  Team team(static_shared<Team::Shared>());
  const uint64_t best = best_of_row(plan, blockIdx.x, team);
  if (threadIdx.x == 0) store(p.out + blockIdx.x, token_of(best));
}

// ---- The last launch: cuts and the draw ----

struct alignas(16) SelectShared {
  Histograms::Shared histograms;
  Team::Shared team;
  Marks marks;
  uint32_t listed;
};

// The token of a row from its candidates. `sum`: of exp(score - largest) over the row if it is
// known and not all columns are candidates; 0: over what top-k keeps.
template <typename Source>
__device__ uint64_t choose(const SampleParams& p, int64_t row, const Elements& elements,
                           uint32_t largest_key, double sum, Source& source, Histograms& histograms,
                           Team& team) {
  const float largest = from_ordered(largest_key);
  uint64_t bar = elements.least(kAnyKey);
  if (keeps_top_k(p))
    bar = source.cut_count({kAnyKey, largest_key, static_cast<uint32_t>(p.top_k)}, elements,
                           histograms);
  if (p.top_p < 1.0) {
    const Exponential weigh = {elements, largest};
    const double unit = static_cast<double>(weigh.unit());
    const uint64_t target =
        sum > 0.0 ? max(uint64_t{1}, static_cast<uint64_t>(p.top_p * sum * unit)) : 0;
    bar = source.cut_weight(
        {bar, elements.largest(largest_key), target, p.top_p, elements.column_bits}, weigh,
        histograms);
  }
  if (p.min_p > 0.0) bar = max(bar, elements.least(ordered(least_of_min_p(p, largest))));
  const Random random(p, row);
  uint64_t best = 0;
  source.each([&](uint64_t element) {
    if (element < bar) return;
    const uint32_t column = elements.column(element);
    const uint64_t drawn = ranked(elements.score(element) + gumbel(random.word(column)), column);
    best = drawn > best ? drawn : best;
  });
  return team.largest(best);
}

// ---- Launch 1: top-k ----

// A bar that k elements of the piece reach, if it has as many: the k-th largest of the threads'
// largest. For k up to half as many as threads, few more do; and finding it keeps the contention
// for bins away that 16 elements a thread would bring.
template <typename T>
GEMMA2_DEVICE uint32_t low_bar(const Scores<T>& scores, uint32_t largest_key, int64_t k,
                               Histograms& histograms) {
  if (blockDim.x == kWarp || k > blockDim.x) return kAnyKey;
  const float largest = scores.largest();
  const OneKey one = {largest > -kInfinity ? ordered(largest) : 0};
  Cut<uint32_t> cut(kAnyKey, largest_key, static_cast<uint32_t>(k));
  while (!cut.done()) cut.template step<false>(histograms, one, One());
  return cut.lo();
}

struct TopKShared {
  Histograms::Shared histograms;
  Team::Shared team;
  Marks marks;
};

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 4) top_k_kernel(SampleParams p, Plan plan) {
  TopKShared& shared = static_shared<TopKShared>();
  Team team(shared.team);
  const Place place(plan);
  Scores<T> scores;
  const bool ok = scores.from(Packs<T>(p, plan, place), p, place, shared.marks);
  const uint64_t best = team.largest(ok ? ranked(scores.largest(), 0) : kBad);
  Piece& piece = plan.pieces[blockIdx.x];
  if (threadIdx.x == 0) store(&piece.best, best);
  uint32_t n = 0;
  if (best != kBad && best != 0) {
    Histograms histograms(shared.histograms);
    const KeysInRegisters<T> keys = {scores};
    uint32_t bar = low_bar(scores, key_of(best), p.top_k, histograms);
    uint64_t reach = 0;
    keys.each([&](uint32_t key) { reach += key >= bar; });
    if (team.sum(reach) > 2 * static_cast<uint64_t>(p.top_k)) {
      Cut<uint32_t> cut(bar, key_of(best), static_cast<uint32_t>(p.top_k));
      while (!cut.done()) cut.template step<false>(histograms, keys, One());
      bar = cut.lo();
    }
    const InRegisters<T> source = {scores, {place.begin}, plan.elements};
    n = write_elements(source, plan.elements.least(bar),
                       plan.candidates + int64_t{blockIdx.x} * kSamplePiece, team);
  }
  if (threadIdx.x == 0) store(&piece.candidates, n);
}

// ---- Launches 1 and 2: top-p, min-p ----

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 4) sum_kernel(SampleParams p, Plan plan) {
  PieceShared& shared = static_shared<PieceShared>();
  Team team(shared.team);
  const Place place(plan);
  Scores<T> scores;
  const bool ok = scores.from(Packs<T>(p, plan, place), p, place, shared.marks);
  const uint64_t best = team.largest(ok ? ranked(scores.largest(), 0) : kBad);
  float sum = 0.0f;
  if (best != kBad && best != 0) {
    const float largest = from_ordered(key_of(best));
#pragma unroll
    for (float score : scores.at) sum += expf(score - largest);
  }
  const double total = team.sum(static_cast<double>(sum));
  if (threadIdx.x != 0) return;
  store(&plan.pieces[blockIdx.x].best, best);
  store(&plan.pieces[blockIdx.x].sum, total);
}

// Sum of exp(score - largest) over the row. Threads meet in here.
GEMMA2_DEVICE double sum_of_row(const Plan& plan, int64_t row, float largest, Team& team) {
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < plan.per_row; i += blockDim.x) {
    const Piece& piece = plan.pieces[row * plan.per_row + i];
    const uint64_t best = load(&piece.best);
    if (best != 0) sum += load(&piece.sum) * expf(from_ordered(key_of(best)) - largest);
  }
  return team.sum(sum);
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 3) collect_kernel(SampleParams p, Plan plan) {
  PieceShared& shared = static_shared<PieceShared>();
  Team team(shared.team);
  const Place place(plan);
  const Packs<T> packs(p, plan, place);  // under way during the next lines
  const uint64_t best = best_of_row(plan, place.row, team);
  uint32_t n = 0;
  if (best != kBad && best != 0) {
    const float largest = from_ordered(key_of(best));
    float least = -kInfinity;
    if (p.top_p < 1.0) {
      // A little below the bound, for what rounding does to it.
      const double share = sum_of_row(plan, place.row, largest, team) * (1.0 - p.top_p) / p.vocab;
      least = largest + logf(static_cast<float>(share)) - 0.01f;
    }
    if (p.min_p > 0.0) least = fmaxf(least, least_of_min_p(p, largest));
    Scores<T> scores;
    scores.from(packs, p, place, shared.marks);
    const InRegisters<T> source = {scores, {place.begin}, plan.elements};
    n = write_elements(source, plan.elements.least(max(kAnyKey, ordered(least))),
                       plan.candidates + int64_t{blockIdx.x} * kSamplePiece, team);
  }
  if (threadIdx.x == 0) store(&plan.pieces[blockIdx.x].candidates, n);
}

// ---- The last launch ----

struct ChooseShared {
  SelectShared select;
  uint64_t list[kListed];
};

__global__ void __launch_bounds__(kChooseThreads) choose_kernel(SampleParams p, Plan plan) {
  ChooseShared& shared = dynamic_shared<ChooseShared>();
  Team team(shared.select.team);
  const int64_t row = blockIdx.x;
  const bool two_reads = !keeps_top_k(p);
  const uint64_t best = best_of_row(plan, row, team);
  uint64_t drawn = best;
  if (best != kBad && best != 0) {
    Histograms histograms(shared.select.histograms);
    const double sum =
        two_reads && p.top_p < 1.0 ? sum_of_row(plan, row, from_ordered(key_of(best)), team) : 0.0;
    Pooled source = {Pool(plan, row), {shared.list, 0}, shared.select.listed};
    source.list_if_few(plan.elements.least(kAnyKey), source.pool.size(team));
    drawn = choose(p, row, plan.elements, key_of(best), sum, source, histograms, team);
  }
  if (threadIdx.x == 0) store(p.out + row, token_of(drawn));
}

// All of a row of one piece; the list lies behind the layout.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 3) row_kernel(SampleParams p, Plan plan) {
  SelectShared& shared = dynamic_shared<SelectShared>();
  Team team(shared.team);
  const Place place(plan);
  Scores<T> scores;
  const bool ok = scores.from(Packs<T>(p, plan, place), p, place, shared.marks);
  const uint64_t best = team.largest(ok ? ranked(scores.largest(), 0) : kBad);
  uint64_t drawn = best;
  if (best != kBad && best != 0) {
    Histograms histograms(shared.histograms);
    const InRegisters<T> elements = {scores, {place.begin}, plan.elements};
    const uint32_t bar =
        keeps_top_k(p) ? low_bar(scores, key_of(best), p.top_k, histograms) : kAnyKey;
    Listed source = {{reinterpret_cast<uint64_t*>(&shared + 1), 0}};
    source.list.n = write_elements(elements, plan.elements.least(bar), source.list.elements, team);
    sync_block();
    drawn = choose(p, place.row, plan.elements, key_of(best), 0.0, source, histograms, team);
  }
  if (threadIdx.x == 0) store(p.out + place.row, token_of(drawn));
}

}  // namespace

void sample(const SampleParams& p, CudaCall& call) {
  // As few threads as hold a row of one piece, in full warps.
  const int64_t pieces = ceil_div(p.vocab, kSamplePiece);
  const unsigned threads = pieces > 1 ? kPieceThreads : ceil_div(p.vocab, kColumns * kWarp) * kWarp;
  const unsigned rows = p.batch, blocks = p.batch * pieces;
  Plan plan = {{0}, static_cast<uint32_t>(pieces), false, nullptr, nullptr};
  while ((int64_t{1} << plan.elements.column_bits) < p.vocab) ++plan.elements.column_bits;
  const bool cut = keeps_top_k(p) || p.top_p < 1.0 || p.min_p > 0.0;
  const bool one_token = p.temperature == 0.0f || !cut;  // a piece's best is all that counts
  if (pieces > 1 && blocks > 0) {
    plan.pieces = static_cast<Piece*>(allocate(call, blocks * int64_t{sizeof(Piece)}));
    if (!one_token)
      plan.candidates =
          static_cast<uint64_t*>(allocate(call, blocks * int64_t{kSamplePiece * sizeof(uint64_t)}));
  }
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    plan.aligned = rows_of_16_bytes<T>(p.logits, p.logits_stride);
    if (one_token) {
      launch(call, "sample best",
             p.temperature == 0.0f ? best_kernel<T, false> : best_kernel<T, true>, blocks, threads,
             0, p, plan);
      if (pieces > 1)
        launch(call, "sample best of pieces", best_row_kernel, rows, kBestThreads, 0, p, plan);
      return;
    }
    if (pieces == 1) {
      launch(call, "sample row", row_kernel<T>, rows, threads,
             sizeof(SelectShared) + p.vocab * sizeof(uint64_t), p, plan);
      return;
    }
    if (keeps_top_k(p)) {
      launch(call, "sample top-k", top_k_kernel<T>, blocks, threads, 0, p, plan);
    } else {
      launch(call, "sample sum", sum_kernel<T>, blocks, threads, 0, p, plan);
      launch(call, "sample collect", collect_kernel<T>, blocks, threads, 0, p, plan);
    }
    launch(call, "sample choose", choose_kernel, rows, kChooseThreads, sizeof(ChooseShared), p,
           plan);
  });
}

}  // namespace gemma2::cuda
