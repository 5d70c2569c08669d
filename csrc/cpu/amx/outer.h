// Sums of left^T right over rows, left narrow: the gradients of factors. Rows are the depth of these products, so left is
// transposed and right's pairs of rows are interleaved on their way to the matrix unit, each once; rows come in groups
// whose numbers stay in the second-level cache, as all the sums do.

#pragma once

#include "attention.h"
#include "epilogues.h"

namespace fastpeft {

// A matrix by blocks of 32 rows by 32 columns, normalised by its rows if there are statistics.
struct Rows {
  Matrix matrix;
  int64_t rows;
  const float* statistics;  // means, then reciprocal deviations; or null

  // Zero behind the last row.
  FASTPEFT_INLINE void load(int64_t row_block, int64_t column_block, __m512i out[kBlock]) const {
    const int64_t count = smaller(kBlock, rows - row_block * kBlock);
    if (statistics == nullptr) {
      for (int64_t r = 0; r < count; ++r) out[r] = opaque(read_narrow(matrix, row_block, r, column_block));
    } else {
      for (int64_t r = 0; r < count; ++r) {
        const float mean = statistics[row_block * kBlock + r], rstd = statistics[rows + row_block * kBlock + r];
        const __m512 s = constant(rstd), shift = constant(-mean * rstd);
        const Row x = read(matrix, row_block, r, column_block);
        out[r] = narrow(_mm512_fmadd_ps(x.low, s, shift), _mm512_fmadd_ps(x.high, s, shift));
      }
    }
    for (int64_t r = count; r < kBlock; ++r) out[r] = _mm512_setzero_si512();
  }

  // Asks for a block that is read a row of blocks later: the processor does not foresee 32 rows at once.
  FASTPEFT_INLINE void prefetch(int64_t row_block, int64_t column_block) const {
    const int64_t count = smaller(kBlock, rows - row_block * kBlock);
    if (matrix.layout == kWide) {
      for (int64_t r = 0; r < count; ++r) {
        const float* p = wide_place(matrix, row_block, r, column_block);
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(p + 16), _MM_HINT_T1);
      }
      return;
    }
    const auto* p = reinterpret_cast<const char*>(place(matrix, row_block, 0, column_block));
    const int64_t stride = matrix.layout == kBlocked ? kBlock * 2 : matrix.stride * 2;
    for (int64_t r = 0; r < count; ++r) _mm_prefetch(p + r * stride, _MM_HINT_T1);
  }
};

// wide x count blocks of sums. A group's rows are put into `left` and `right`, then `add` multiplies them.
class Outer {
 public:
  Outer(int64_t wide, int64_t count, int64_t group) : wide_(wide), count_(count), group_(group) {}

  static int64_t bytes(int64_t wide, int64_t count, int64_t group) {
    return ((wide + count) * group * 2 + wide * count * 4) * kBlockSize;
  }

  // Takes `bytes` of memory; the sums are zero then.
  void begin(void* memory) {
    left_ = static_cast<bf16*>(memory);
    right_ = left_ + wide_ * group_ * kBlockSize;
    sums_ = reinterpret_cast<float*>(right_ + count_ * group_ * kBlockSize);
    fresh_ = true;
  }

  // Row block k of the group.
  FASTPEFT_INLINE void put_left(int64_t k, int64_t w, const __m512i rows[kBlock]) {
    put_left_transposed(rows, left_ + (w * group_ + k) * kBlockSize);
  }
  FASTPEFT_INLINE void put_right(int64_t k, int64_t n, const __m512i rows[kBlock]) {
    fastpeft::put_right(rows, right_ + (n * group_ + k) * kBlockSize);
  }

  // The products of a group of `steps` row blocks.
  void add(int64_t steps) {
    const int64_t total = wide_ * count_;
    if (fresh_)
      zero_sums();
    else
      load_sums(sums_);
    for (int64_t i = 0; i < total; ++i) {
      for (int64_t k = 0; k < steps; ++k)
        multiply_step(left_ + (i % wide_ * group_ + k) * kBlockSize, right_ + (i / wide_ * group_ + k) * kBlockSize);
      swap_sums(sums_ + i * kSums, fresh_ || i + 1 == total ? nullptr : sums_ + (i + 1) * kSums);
    }
    fresh_ = false;
  }

  // To `out`, whose rows are `stride` apart; zeros if nothing was added.
  void write(float* out, int64_t stride) const {
    for (int64_t n = 0; n < count_; ++n)
      for (int64_t w = 0; w < wide_; ++w)
        for (int64_t r = 0; r < kBlock; ++r) {
          const Row s = fresh_ ? Row{_mm512_setzero_ps(), _mm512_setzero_ps()} : sums_of(sums_ + (n * wide_ + w) * kSums, r);
          float* to = out + (w * kBlock + r) * stride + n * kBlock;
          _mm512_storeu_ps(to, s.low);
          _mm512_storeu_ps(to + 16, s.high);
        }
  }

 private:
  int64_t wide_, count_, group_;
  bf16 *left_ = nullptr, *right_ = nullptr;
  float* sums_ = nullptr;
  bool fresh_ = true;
};

}  // namespace fastpeft
