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

#include "common/philox.h"
#include "cuda/launch.h"
#include "cuda/sample_select.h"
#include "cuda/vec.h"

namespace gemma2::cuda {
namespace {

constexpr int kColumns = 16;  // of a thread
constexpr int kPieceThreads = kSamplePiece / kColumns;
constexpr int kBestThreads = 64;  // combine the pieces' best
constexpr int kChooseThreads = 1024;
constexpr int kListed = 8192;            // elements that the last launch holds in shared memory
constexpr uint64_t kBad = ~uint64_t{0};  // in place of a piece's best: NaN or +infinity
constexpr uint32_t kAnyKey = 1;          // not above the key of any number

static_assert(kPieceThreads == 256, "what the plan above says");

inline GEMMA2_HOST_DEVICE bool keeps_top_k(const SampleParams& p) {
  return p.top_k > 0 && p.top_k < p.vocab;
}
// The least score that min-p keeps.
GEMMA2_DEVICE float least_of_min_p(const SampleParams& p, float largest) {
  return largest + logf(static_cast<float>(p.min_p));
}

// What is known of a piece, in scratch.
struct alignas(16) Piece {
  uint64_t best;  // ranked(), kBad or 0: nothing above -infinity
  double sum;     // of exp(score - largest)
  uint32_t candidates;
};
static_assert(sizeof(Piece) == kSamplePieceRecord, "sample_scratch_bytes() counts with it");

struct Plan {
  Elements elements;
  uint32_t per_row;      // pieces
  bool aligned;          // rows can be read 16 bytes at a time
  Piece* pieces;         // [batch, per_row]; null where that is 1, as are the
  uint64_t* candidates;  // [batch, per_row, kSamplePiece]
};

// What a block works on: all of a row, or a piece of one.
struct Place {
  int64_t row;
  uint32_t begin;  // first column
  GEMMA2_DEVICE explicit Place(const Plan& plan)
      : row(blockIdx.x / plan.per_row),
        begin(blockIdx.x % plan.per_row * static_cast<uint32_t>(kSamplePiece)) {}
};

// ---- Scores ----

// Columns of this thread: packs of 16 bytes, neighbours to its neighbours'.
template <typename T>
struct Columns {
  static constexpr int kCount = Vec<T>::kCount;
  static constexpr int kPacks = kColumns / kCount;
  uint32_t begin;  // of the block's piece

  GEMMA2_DEVICE uint32_t operator()(int i) const {
    return begin + (i / kCount * blockDim.x + threadIdx.x) * kCount + i % kCount;
  }
};

struct Marks {
  uint32_t words[kSamplePiece / 32];  // a bit a column of the piece: is in the history
};

GEMMA2_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GEMMA2_DEVICE uint32_t bits_of(bf16_t x) { return x.bits; }
GEMMA2_DEVICE uint32_t bits_of(f16_t x) { return x.bits; }

template <typename T>
constexpr uint32_t kMinusInfinity = 0xff800000u;
template <>
constexpr uint32_t kMinusInfinity<bf16_t> = 0xff80u;
template <>
constexpr uint32_t kMinusInfinity<f16_t> = 0xfc00u;

// 16 bytes of the row from `column` on, -infinity behind its end.
template <typename T>
GEMMA2_DEVICE uint4 load_columns(const T* row, uint32_t column, uint32_t vocab, bool aligned) {
  constexpr int kCount = Vec<T>::kCount, kPerWord = kCount / 4;
  if (aligned && column + kCount <= vocab)
    return load_once(reinterpret_cast<const uint4*>(row + column));
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      const uint32_t at = column + i * kPerWord + j;
      words[i] |= (at < vocab ? bits_of(load(row + at)) : kMinusInfinity<T>) << (16 * j);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The bits of the piece's columns. Threads meet in here.
__device__ void mark_history(const SampleParams& p, const Place& place, Marks& marks) {
  const int64_t columns = blockDim.x * kColumns;
  for (int64_t i = threadIdx.x; i < columns / 32; i += blockDim.x) store(marks.words + i, 0u);
  sync_block();
  const int64_t* history = p.history + place.row * p.history_length;
  constexpr int kUnder = 8;  // loads under way
  for (int64_t first = threadIdx.x; first < p.history_length; first += kUnder * blockDim.x) {
    int64_t tokens[kUnder];
#pragma unroll
    for (int i = 0; i < kUnder; ++i) {
      const int64_t at = first + i * blockDim.x;
      tokens[i] = at < p.history_length ? load(history + at) : -1;
    }
#pragma unroll
    for (const int64_t token : tokens) {
      if (token >= p.vocab)
        GEMMA2_STOP("sample: history holds a token that logits has no column for");
      const int64_t at = token - place.begin;
      if (at >= 0 && at < columns) atomic_or(marks.words + at / 32, 1u << (at % 32));
    }
  }
  sync_block();
}

// The thread's logits of a piece as they come from memory.
template <typename T>
struct Packs {
  uint4 at[Columns<T>::kPacks];

  GEMMA2_DEVICE Packs(const SampleParams& p, const Plan& plan, const Place& place) {
    const Columns<T> columns = {place.begin};
    const T* row = static_cast<const T*>(p.logits) + place.row * p.logits_stride;
#pragma unroll
    for (int j = 0; j < Columns<T>::kPacks; ++j)
      at[j] = load_columns(row, columns(j * Columns<T>::kCount), static_cast<uint32_t>(p.vocab),
                           plan.aligned);
  }
};

// The thread's scores of a piece.
template <typename T>
struct Scores {
  float at[kColumns];

  // False if one is NaN or +infinity. Threads meet in here.
  GEMMA2_DEVICE bool from(const Packs<T>& packs, const SampleParams& p, const Place& place,
                          Marks& marks) {
    constexpr int kCount = Columns<T>::kCount, kPacks = Columns<T>::kPacks;
    const Columns<T> columns = {place.begin};
    const bool penalised = p.history != nullptr && p.repetition_penalty != 1.0f;
    // Without a penalty, the first piece's block still checks the history.
    if (penalised || (p.history != nullptr && place.begin == 0)) mark_history(p, place, marks);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const Vec<T> x = unpack<T>(packs.at[j]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) at[j * kCount + i] = x.at[i];
      if (!penalised) continue;
      const uint32_t offset = columns(j * kCount) - place.begin;
      const uint32_t marked = load(marks.words + offset / 32) >> (offset % 32);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float& score = at[j * kCount + i];
        if (marked >> i & 1)
          score = score < 0.0f ? score * p.repetition_penalty : score / p.repetition_penalty;
      }
    }
    if (p.temperature != 0.0f && p.temperature != 1.0f) {
#pragma unroll
      for (float& score : at) score = score / p.temperature;
    }
    bool ok = true;
#pragma unroll
    for (float score : at) ok &= score < kInfinity;
    return ok;
  }

  GEMMA2_DEVICE float largest() const {
    float largest = -kInfinity;
#pragma unroll
    for (float score : at) largest = score > largest ? score : largest;
    return largest;
  }
};

// Orders columns by score and, of equal scores, the first before the others; 0 is none.
GEMMA2_DEVICE uint64_t ranked(float score, uint32_t column) {
  return score > -kInfinity ? uint64_t{ordered(score)} << 32 | ~column : 0;
}
GEMMA2_DEVICE uint32_t key_of(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }

GEMMA2_DEVICE int64_t token_of(uint64_t rank) {
  return rank == kBad ? kSampleNotFinite
         : rank == 0  ? kSampleEmpty
                      : static_cast<int64_t>(~static_cast<uint32_t>(rank));
}

// ---- Random numbers: common/philox.h ----

struct Multiply {
  GEMMA2_HOST_DEVICE void operator()(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) const {
    const uint64_t product = uint64_t{a} * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

struct Words {
  uint32_t of[4];
};

struct Random {
  uint32_t key0, key1, row, step0, step1;

  GEMMA2_DEVICE Random(const SampleParams& p, int64_t row_)
      : key0(static_cast<uint32_t>(p.seed)),
        key1(static_cast<uint32_t>(p.seed >> 32)),
        row(static_cast<uint32_t>(row_)) {
    const uint64_t step = static_cast<uint64_t>(load(p.step));
    step0 = static_cast<uint32_t>(step);
    step1 = static_cast<uint32_t>(step >> 32);
  }
  // Of the four columns from `column` on, a multiple of four.
  GEMMA2_DEVICE Words words(uint32_t column) const {
    Words w = {{column / 4, row, step0, step1}};
    philox4x32_10(w.of, key0, key1, Multiply());
    return w;
  }
  GEMMA2_DEVICE uint32_t word(uint32_t column) const {
    const Words w = words(column);
    const uint32_t even = column & 2 ? w.of[2] : w.of[0], odd = column & 2 ? w.of[3] : w.of[1];
    return column & 1 ? odd : even;
  }
};

// -ln(-ln u) of u = (word + 1/2) / 2^32.
GEMMA2_DEVICE float gumbel(uint32_t word) {
  const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  const float rest = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;  // 1 - u, precise near 0
  const float exponential = rest < 0.25f ? -log1pf(-rest) : -logf(u);
  return -logf(exponential);
}

// Not below gumbel(word), and mostly by less than 0.1 above it where that is large, without
// logarithms: -ln u >= 1 - u, of which 23 bits are taken; its logarithm to base 2 is at least
// exponent + mantissa, which a float's bits are.
GEMMA2_DEVICE float gumbel_bound(uint32_t word) {
  const float rest = __uint_as_float(0x3f800000u | ~word >> 9) - 1.0f;
  const float log2_rest = __uint_as_float(0x4b000000u | __float_as_uint(rest) >> 8);  // + 383 2^15
  constexpr float kLn2 = 0.693147180559945f;
  return fmaf(log2_rest, -kLn2 * 0x1p-15f, 383.0f * kLn2 + 0.001f);
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

struct alignas(16) SelectShared {
  Histograms::Shared histograms;
  Team::Shared team;
  Marks marks;
  uint32_t listed;
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

  // Moves the elements >= bar, of which there are n, if the list has room for them.
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

// ---- Candidates of a piece ----

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
    for (float score : scores.at) f(score > -kInfinity ? ordered(score) : 0u);
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

// ---- Launch 1: top-k ----

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
  if (pieces > 1) {
    plan.pieces = static_cast<Piece*>(call.scratch);
    plan.candidates = reinterpret_cast<uint64_t*>(plan.pieces + p.batch * pieces);
  }
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    plan.aligned = rows_of_16_bytes<T>(p.logits, p.logits_stride);
    const bool cut = keeps_top_k(p) || p.top_p < 1.0 || p.min_p > 0.0;
    if (p.temperature == 0.0f || !cut) {
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
