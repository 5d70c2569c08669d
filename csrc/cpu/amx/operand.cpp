// A matrix in one of the forms in which the matrix unit reads it, read once, in the order in which it lies in memory.
//
//   kColumnsRight  a right factor whose columns are the matrix's rows: a weight W in x W^T
//   kDepthRight    a right factor whose depth are the rows: W in dy W, x in dy^T x
//   kDepthLeft     a left factor whose depth are the rows: dy in dy^T x
//
// Rows may be normalised, columns and rows scaled on the way; sums over the rows and products with a vector come along.

#include "attention.h"
#include "matrix.h"

namespace fastpeft {

enum Form : int32_t { kNoForm = 0, kColumnsRight = 1, kDepthRight = 2, kDepthLeft = 3 };

struct Operand {
  int64_t rows, columns;  // columns are a multiple of 32; rows that are missing to one become zeros
  Matrix source;
  const float* statistics;  // 2 x rows: rows are normalised with these means and reciprocal deviations; or null
  const float* column_scale;  // behind the normalisation; or null
  const float* column_shift;  // behind the scale; or null
  const float* row_scale;     // or null
  const float* vector;        // columns, for `dots`
  float* dots;                // rows: source times vector; or null
  float* sums;                // parts x columns: sums over a part of the rows each, as scaled; or null
  bf16* out;                  // ceil(rows / 32) * columns / 32 blocks, or null
  int64_t parts;
  int32_t form;
  int32_t threads;
};

namespace {

FASTPEFT_INLINE Row multiply_add(Row x, Row scale, Row shift) {
  return {_mm512_fmadd_ps(x.low, scale.low, shift.low), _mm512_fmadd_ps(x.high, scale.high, shift.high)};
}

FASTPEFT_INLINE Row both(float x) { return {constant(x), constant(x)}; }

FASTPEFT_INLINE Row row_of(const float* values, int64_t column_block, float otherwise) {
  if (values == nullptr) return both(otherwise);
  return {_mm512_loadu_ps(values + column_block * kBlock), _mm512_loadu_ps(values + column_block * kBlock + 16)};
}

// Whether the numbers go through as they are.
bool plain(const Operand& o) {
  return o.source.layout != kWide && o.statistics == nullptr && o.column_scale == nullptr && o.column_shift == nullptr &&
         o.row_scale == nullptr;
}

// 32 rows by 32 columns, zero behind the last row; adds to the sums.
template <bool changed>
FASTPEFT_INLINE void load(const Operand& o, int64_t row_block, int64_t column_block, float* sums, __m512i out[kBlock]) {
  const int64_t count = smaller(kBlock, o.rows - row_block * kBlock);
  const Row scale = row_of(o.column_scale, column_block, 1.0f), shift = row_of(o.column_shift, column_block, 0.0f);
  Row total = both(0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = row_block * kBlock + r;
    if constexpr (changed) {
      Row x = read(o.source, row_block, r, column_block);
      if (o.statistics != nullptr) {
        const float mean = o.statistics[i], rstd = o.statistics[o.rows + i];
        x = multiply_add(x, both(rstd), both(-mean * rstd));
      }
      x = multiply_add(x, scale, shift);
      if (o.row_scale != nullptr) x = multiply_add(x, both(o.row_scale[i]), both(0.0f));
      total = {_mm512_add_ps(total.low, x.low), _mm512_add_ps(total.high, x.high)};
      out[r] = narrow(x.low, x.high);
    } else {
      out[r] = read_narrow(o.source, row_block, r, column_block);
      if (sums != nullptr)
        total = {_mm512_add_ps(total.low, low_half(out[r])), _mm512_add_ps(total.high, high_half(out[r]))};
    }
  }
  for (int64_t r = count; r < kBlock; ++r) out[r] = _mm512_setzero_si512();
  if (sums != nullptr) {
    float* at = sums + column_block * kBlock;
    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), total.low));
    _mm512_storeu_ps(at + 16, _mm512_add_ps(_mm512_loadu_ps(at + 16), total.high));
  }
}

void dots_of(const Operand& o, int64_t row_block) {
  const int64_t count = smaller(kBlock, o.rows - row_block * kBlock);
  for (int64_t r = 0; r < count; ++r) {
    Row total = both(0.0f);
    for (int64_t n = 0; n < o.columns / kBlock; ++n)
      total = multiply_add(read(o.source, row_block, r, n), row_of(o.vector, n, 0.0f), total);
    o.dots[row_block * kBlock + r] = _mm512_reduce_add_ps(_mm512_add_ps(total.low, total.high));
  }
}

template <bool changed>
void run(const Operand& o, Range mine, float* sums) {
  const int64_t rows = ceil_div(o.rows, kBlock), columns = o.columns / kBlock;
  __m512i block[kBlock];
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    if (o.dots != nullptr) dots_of(o, i);
    for (int64_t n = 0; n < columns; ++n) {
      load<changed>(o, i, n, sums, block);
      switch (o.form) {
        case kColumnsRight:
          put_right_transposed(block, o.out + (i * columns + n) * kBlockSize);
          break;
        case kDepthRight:
          put_right(block, o.out + (n * rows + i) * kBlockSize);
          break;
        case kDepthLeft:
          put_left_transposed(block, o.out + (n * rows + i) * kBlockSize);
          break;
        default:
          break;
      }
    }
  }
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(operand)(const fastpeft::Operand* operand) {
  using namespace fastpeft;
  const Operand& o = *operand;
  const int64_t blocks = ceil_div(o.rows, kBlock);
  const int threads = team(o.threads, o.parts);
  parallel(threads, [&](int thread) {
    // Sums belong to a part, not to a thread: there may be fewer threads than were asked for.
    for (int64_t part = thread; part < o.parts; part += threads) {
      float* sums = o.sums == nullptr ? nullptr : o.sums + part * o.columns;
      if (sums != nullptr) std::memset(sums, 0, o.columns * sizeof(float));
      const Range mine = part_of(blocks, o.parts, part);
      if (plain(o))
        run<false>(o, mine, sums);
      else
        run<true>(o, mine, sums);
    }
  });
  return kOk;
}
