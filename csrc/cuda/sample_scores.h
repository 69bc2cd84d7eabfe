// Scores of a row's columns, and its random numbers: what all kernels of sample.cu begin with.
#pragma once

#include "common/philox.h"
#include "cuda/pack.h"
#include "cuda/sample_select.h"
#include "params/sample.h"

namespace gemma2::cuda::sampling {

constexpr int64_t kSamplePiece = 4096;  // columns
constexpr int kColumns = 16;            // of a thread
constexpr int kPieceThreads = kSamplePiece / kColumns;

// What is known of a piece, in scratch.
struct alignas(16) Piece {
  uint64_t best;  // ranked(), kBad or 0: nothing above -infinity
  double sum;     // of exp(score - largest)
  uint32_t candidates;
};

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
  static constexpr int kCount = pack_count<T>();
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
  constexpr int kCount = pack_count<T>(), kPerWord = kCount / 4;
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
__device__ inline void mark_history(const SampleParams& p, const Place& place, Marks& marks) {
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
      const uint4 bytes = packs.at[j];
      const Pack<T, kCount> x = {{bytes.x, bytes.y, bytes.z, bytes.w}};
#pragma unroll
      for (int i = 0; i < kCount; ++i) at[j * kCount + i] = element(x, i);
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

constexpr uint64_t kBad = ~uint64_t{0};  // in place of a rank: a score is NaN or +infinity

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
    const uint64_t step = static_cast<uint64_t>(load(p.step + row_ * p.step_stride));
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

}  // namespace gemma2::cuda::sampling
