// sample: penalty, temperature, top-k, top-p, min-p, then argmax(score + Gumbel), one token a row.
//
// Nothing is sorted. A row is cut into pieces of 16384 columns, the unit of threading; pieces leave
// their results in places of their own, combined in order, so threads do not show.
//   greedy       one read: argmax
//   temperature  one read: argmax of score + Gumbel; one Philox evaluation serves four columns
//   top-k        one read: each piece keeps the columns that reach its k-th largest so far, a
//   rising bar top-p, min-p two reads: maximum and sum of exponentials, then the columns that can
//   be in the set: those
//                less likely than (1 - top_p) / V have less than 1 - top_p together, so none of
//                them is
// What is left are candidates (score, column), mostly a few thousand of 256000. k-th largest and
// top-p are the same search on them, by count or by probability: four histograms of 256 digits
// (`cut`).
//
// About 60 instructions a vector of columns: bound by arithmetic, and small beside the product that
// makes the logits. Called by gemma2/ops/sample.py; reference: gemma2/reference.py.

#include "common/philox.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // a multiple of 64, so that pieces share no word of the marks
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282347e38f;  // a bar that only -infinity and NaN do not reach

// 0, 1, 2, ...
inline vi32 iota() {
  vi32 v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- Scores ----

template <typename T>
struct Row {
  const T* logits;
  int64_t vocab;
  const uint64_t* marks;  // one bit a column: in the history; null without a penalty
  float penalty, temperature;

  // Scores of `lanes` columns from i on, a multiple of kLanes; -infinity behind them.
  vf32 scores(int64_t i, int64_t lanes) const {
    vf32 x = load_upto(logits + i, lanes);
    if (marks != nullptr) {
      uint64_t bits = (marks[i / 64] >> (i % 64)) & ((uint64_t{1} << kLanes) - 1);
      for (; bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctzll(bits);
        const float s = x[lane];
        x[lane] = s < 0 ? s * penalty : s / penalty;
      }
    }
    x = x / temperature;
    return lanes == kLanes ? x : (iota() < (int32_t)lanes ? x : splat(-kInfinity));
  }
};

// body(i, scores) for the columns of [begin, end); false if one of them is NaN or +infinity.
template <typename T, typename F>
bool for_scores(const Row<T>& row, int64_t begin, int64_t end, const F& body) {
  vi32 bad = {};
  for_lanes(end - begin, [&](int64_t i, int64_t lanes) {
    const vf32 s = row.scores(begin + i, lanes);
    bad |= ~(s < kInfinity);
    body(begin + i, s);
  });
  return !any(bad);
}

// ---- Random numbers: common/philox.h ----

inline void multiply(uint32_t a, vu32 b, vu32& high, vu32& low) {
#if defined(__AVX512F__)
  const __m512i x = _mm512_set1_epi32((int)a), y = (__m512i)b;
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(x, _mm512_srli_epi64(y, 32));
  high = (vu32)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = (vu32)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i x = _mm256_set1_epi32((int)a), y = (__m256i)b;
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(x, _mm256_srli_epi64(y, 32));
  high = (vu32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vu32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = (uint64_t)a * b[i];
    high[i] = (uint32_t)(product >> 32);
    low[i] = (uint32_t)product;
  }
#endif
}

struct Random {
  uint32_t key0, key1, row, step0, step1;

  // The four words of each lane's counter.
  void words(vu32 counter, vu32 (&out)[4]) const {
    out[0] = counter;
    out[1] = vu32{} + row;
    out[2] = vu32{} + step0;
    out[3] = vu32{} + step1;
    philox4x32_10(out, key0, key1,
                  [](uint32_t a, vu32 b, vu32& high, vu32& low) { multiply(a, b, high, low); });
  }
};

// -ln(-ln u) of u = (word + 1/2) / 2^32.
inline vf32 gumbel(vu32 word) {
  const vf32 u = (__builtin_convertvector(word, vf32) + 0.5f) * 0x1p-32f;
  const vf32 rest =
      (__builtin_convertvector(~word, vf32) + 0.5f) * 0x1p-32f;  // 1 - u, precise near 0
  const vf32 exponential = rest < 0.25f ? -log_1p_scaled(-rest, vf32{}) : -log(u);
  return -log(exponential);
}

// ---- Largest score: the first of equal ones ----

struct Best {
  float score;
  int64_t column;  // -1: none above -infinity
};

struct BestLanes {
  vf32 score = splat(-kInfinity);
  vi32 column = splat_int(-1);

  void offer(vf32 s, vi32 columns) {
    const vi32 better = s > score;
    score = better ? s : score;
    column = better ? columns : column;
  }
  Best reduce() const {
    Best best = {-kInfinity, -1};
    for (int i = 0; i < kLanes; ++i) {
      const float s = score[i];
      if (s > best.score || (s == best.score && column[i] >= 0 && column[i] < best.column))
        best = {s, column[i]};
    }
    return best;
  }
};

// ---- Candidates ----

struct Candidates {
  float* score;
  int32_t* column;  // ascending
  int64_t n;
};

// Floats as integers of the same order; -0 is +0.
inline uint32_t ordered(float x) {
  const float positive_zero = x + 0.0f;
  uint32_t bits;
  memcpy(&bits, &positive_zero, sizeof bits);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
inline float from_ordered(uint32_t key) {
  const uint32_t bits = key & 0x80000000 ? key & 0x7fffffff : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest score such that the weights of all scores >= it sum to `target` (or the smallest
// score, if all together do not), and the weight of those above it. weight null: 1 each.
struct Cut {
  float score;
  double above;
};
Cut cut(const float* score, const float* weight, int64_t n, double target) {
  uint32_t prefix = 0, prefix_mask = 0;
  double above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    double sum[256] = {};
    bool present[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = ordered(score[i]);
      if ((key & prefix_mask) != prefix) continue;
      const uint32_t digit = key >> shift & 255;
      sum[digit] += weight == nullptr ? 1.0 : weight[i];
      present[digit] = true;
    }
    int last = 0;
    while (!present[last]) ++last;
    int digit = 255;
    for (; digit > last && above + sum[digit] < target; --digit) above += sum[digit];
    prefix |= (uint32_t)digit << shift;
    prefix_mask |= 255u << shift;
  }
  return {from_ordered(prefix), above};
}

// Keeps what keep(i) says, in order.
template <typename F>
void filter(Candidates& c, const F& keep) {
  int64_t kept = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    c.score[kept] = c.score[i];
    c.column[kept] = c.column[i];
    kept += keep(i);
  }
  c.n = kept;
}

// Those among the k largest, and all that equal the k-th. Returns the k-th.
float keep_top_k(Candidates& c, int64_t k) {
  if (c.n <= k) return kLowest;
  const float bar = cut(c.score, nullptr, c.n, (double)k).score;
  filter(c, [&](int64_t i) { return c.score[i] >= bar; });
  return bar;
}

// The columns of [begin, end) whose score reaches `bar`; with k > 0 the bar rises to the k-th
// largest.
template <typename T>
bool collect(const Row<T>& row, int64_t begin, int64_t end, float bar, int64_t k, Candidates& out) {
  out.n = 0;
  int64_t limit = k > 0 ? 2 * k + 256 : end - begin;
  const bool ok = for_scores(row, begin, end, [&](int64_t i, vf32 s) {
    const vi32 hit = s >= bar;
    if (!any(hit)) return;
    for (int lane = 0; lane < kLanes; ++lane)
      if (hit[lane]) {
        out.score[out.n] = s[lane];
        out.column[out.n++] = (int32_t)(i + lane);
      }
    if (k > 0 && out.n >= limit) {
      bar = keep_top_k(out, k);
      limit = 2 * (out.n > k ? out.n : k) + 256;  // many may equal the k-th
    }
  });
  if (k > 0) keep_top_k(out, k);
  return ok;
}

// The shortest run of largest scores with a weight of top_p * total; of equal scores those with the
// larger columns come first, as in transformers. `spare` holds n floats.
void keep_top_p(Candidates& c, float largest, double target, float* spare) {
  for_lanes(c.n, [&](int64_t i, int64_t lanes) {
    store_upto(spare + i, exp(load_upto(c.score + i, lanes) - largest), lanes);
  });
  const Cut at = cut(c.score, spare, c.n, target);
  int64_t equal = 0;
  double weight = 0;
  for (int64_t i = 0; i < c.n; ++i)
    if (c.score[i] == at.score) {
      ++equal;
      weight = spare[i];
    }
  int64_t wanted = 1;
  while (wanted < equal && at.above + wanted * weight < target) ++wanted;
  int64_t skip = equal - wanted;
  filter(c, [&](int64_t i) {
    if (c.score[i] == at.score) return --skip < 0;
    return c.score[i] > at.score;
  });
}

Best draw(const Candidates& c, const Random& random) {
  BestLanes best;
  for_lanes(c.n, [&](int64_t i, int64_t lanes) {
    int32_t column[kLanes] = {};
    memcpy(column, c.column + i, lanes * sizeof(int32_t));
    vi32 at;
    memcpy(&at, column, sizeof at);
    vu32 w[4];
    random.words((vu32)at >> 2, w);
    const vi32 which = at & 3;
    const vu32 word = which < 2 ? (which == 0 ? w[0] : w[1]) : (which == 2 ? w[2] : w[3]);
    const vf32 s = load_upto(c.score + i, lanes) + gumbel(word);
    best.offer(lanes == kLanes ? s : (iota() < (int32_t)lanes ? s : splat(-kInfinity)), at);
  });
  return best.reduce();
}

// ---- One row ----

struct Piece {
  bool ok;
  Best best;   // greedy, temperature
  double sum;  // of exp(score - best.score): top-p, min-p
  Candidates candidates;
};

// A buffer of `n` objects without constructors, freed at the end of the scope.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(malloc(n * sizeof(T) + 64))) {
    if (data_ == nullptr) abort();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

template <typename T>
Piece greedy_piece(const Row<T>& row, int64_t begin, int64_t end) {
  BestLanes best;
  const bool ok =
      for_scores(row, begin, end, [&](int64_t i, vf32 s) { best.offer(s, iota() + (int32_t)i); });
  return {ok, best.reduce(), 0, {}};
}

template <typename T>
Piece gumbel_piece(const Row<T>& row, int64_t begin, int64_t end, const Random& random) {
  BestLanes best;
  uint32_t word[4 * kLanes];
  const bool ok = for_scores(row, begin, end, [&](int64_t i, vf32 s) {
    const int64_t at = (i - begin) % (4 * kLanes);
    if (at == 0) {  // the next 4 kLanes columns
      vu32 w[4];
      random.words((vu32)iota() + (uint32_t)(i / 4), w);
      for (int lane = 0; lane < kLanes; ++lane)
        for (int j = 0; j < 4; ++j) word[4 * lane + j] = w[j][lane];
    }
    vu32 words;
    memcpy(&words, word + at, sizeof words);
    best.offer(s + gumbel(words), iota() + (int32_t)i);
  });
  return {ok, best.reduce(), 0, {}};
}

// Maximum and sum of exponentials; the second look at the piece finds it in the cache.
template <typename T>
Piece sum_piece(const Row<T>& row, int64_t begin, int64_t end) {
  Piece out = greedy_piece(row, begin, end);
  if (!out.ok || out.best.column < 0) return out;
  const float largest = out.best.score;
  vf32 sum = {};
  for_scores(row, begin, end, [&](int64_t, vf32 s) { sum += exp(s - largest); });
  out.sum = reduce_add(sum);
  return out;
}

struct Pieces {
  int64_t vocab;
  Piece* piece;

  int64_t count() const { return (vocab + kPiece - 1) / kPiece; }

  // piece[i] = body(i, begin, end), in parallel; false if one is not ok.
  template <typename F>
  bool run(const F& body) const {
    parallel(count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        piece[i] = body(i, i * kPiece, min64(vocab, (i + 1) * kPiece));
    });
    bool ok = true;
    for (int64_t i = 0; i < count(); ++i) ok = ok && piece[i].ok;
    return ok;
  }
  Best best() const {
    Best best = piece[0].best;
    for (int64_t i = 1; i < count(); ++i)
      if (piece[i].best.score > best.score) best = piece[i].best;
    return best;
  }
  // Sum of exp(score - largest) over the row.
  double sum(float largest) const {
    double total = 0;
    for (int64_t i = 0; i < count(); ++i)
      if (piece[i].best.column >= 0)
        total += piece[i].sum * exp(splat(piece[i].best.score - largest))[0];
    return total;
  }
  // All candidates, moved together.
  Candidates gather() const {
    Candidates all = piece[0].candidates;
    for (int64_t i = 1; i < count(); ++i) {
      const Candidates& c = piece[i].candidates;
      memmove(all.score + all.n, c.score, c.n * sizeof(float));
      memmove(all.column + all.n, c.column, c.n * sizeof(int32_t));
      all.n += c.n;
    }
    return all;
  }
};

float log_of(double x) { return log(splat((float)x))[0]; }

int64_t token_of(const Best& best) { return best.column < 0 ? kSampleEmpty : best.column; }

template <typename T>
int64_t sample_row(const SampleParams& p, const Row<T>& row, const Random& random) {
  Buffer<Piece> storage((p.vocab + kPiece - 1) / kPiece);
  const Pieces pieces = {p.vocab, storage.get()};
  const bool some = p.top_k > 0 && p.top_k < p.vocab, cumulative = p.top_p < 1.0;
  if (p.temperature == 0.f || !(some || cumulative || p.min_p > 0.0)) {
    const bool greedy = p.temperature == 0.f;
    const bool ok = pieces.run([&](int64_t, int64_t begin, int64_t end) {
      return greedy ? greedy_piece(row, begin, end) : gumbel_piece(row, begin, end, random);
    });
    return ok ? token_of(pieces.best()) : kSampleNotFinite;
  }

  // Every piece has room for all of its columns; memory is touched only where candidates are.
  Buffer<float> scores(p.vocab), spare(p.vocab);
  Buffer<int32_t> columns(p.vocab);
  const auto collect_all = [&](float bar, int64_t k) {
    return pieces.run([&](int64_t, int64_t begin, int64_t end) {
      Piece out = {true, {-kInfinity, -1}, 0, {scores.get() + begin, columns.get() + begin, 0}};
      out.ok = collect(row, begin, end, bar, k, out.candidates);
      return out;
    });
  };

  float largest = -kInfinity;
  double total = 0;
  float bar = kLowest;
  if (!some) {
    if (!pieces.run(
            [&](int64_t, int64_t begin, int64_t end) { return sum_piece(row, begin, end); }))
      return kSampleNotFinite;
    if (pieces.best().column < 0) return kSampleEmpty;
    largest = pieces.best().score;
    total = pieces.sum(largest);
    // A little below the bound, for what rounding does to it.
    if (cumulative) bar = largest + log_of(total * (1.0 - p.top_p) / p.vocab) - 0.01f;
  }
  if (!collect_all(bar > kLowest ? bar : kLowest, some ? p.top_k : 0)) return kSampleNotFinite;
  Candidates c = pieces.gather();
  if (some) {
    keep_top_k(c, p.top_k);
    if (c.n == 0) return kSampleEmpty;
    for (int64_t i = 0; i < c.n; ++i) largest = c.score[i] > largest ? c.score[i] : largest;
    for (int64_t i = 0; i < c.n; ++i) total += exp(splat(c.score[i] - largest))[0];
  }
  if (cumulative) keep_top_p(c, largest, p.top_p * total, spare.get());
  if (p.min_p > 0.0) {
    const float least = largest + log_of(p.min_p);
    filter(c, [&](int64_t i) { return c.score[i] >= least; });
  }
  return token_of(draw(c, random));
}

}  // namespace

void sample(const SampleParams& p) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool penalised = p.history != nullptr && p.repetition_penalty != 1.f;
    const int64_t mark_words = penalised ? (p.vocab + 63) / 64 : 0;
    const auto rows = [&](int64_t begin, int64_t end) {
      Buffer<uint64_t> marks(mark_words);
      for (int64_t r = begin; r < end; ++r) {
        memset(marks.get(), 0, mark_words * sizeof(uint64_t));
        for (int64_t i = 0; penalised && i < p.history_length; ++i) {
          const int64_t token = p.history[r * p.history_length + i];
          if (token >= 0) marks.get()[token / 64] |= uint64_t{1} << (token % 64);
        }
        const Row<T> row = {static_cast<const T*>(p.logits) + r * p.logits_stride, p.vocab,
                            penalised ? marks.get() : nullptr, p.repetition_penalty,
                            p.temperature == 0.f ? 1.f : p.temperature};
        const uint64_t step = (uint64_t)p.step[r * p.step_stride];
        const Random random = {(uint32_t)p.seed, (uint32_t)(p.seed >> 32), (uint32_t)r,
                               (uint32_t)step, (uint32_t)(step >> 32)};
        p.out[r] = sample_row(p, row, random);
      }
    };
    // Threads share out the pieces of a row, or, where a row is one piece, the rows.
    if (p.vocab > kPiece)
      rows(0, p.batch);
    else
      parallel(p.batch, kPiece / p.vocab, rows);
  });
}

}  // namespace gemma2::GEMMA2_ISA
