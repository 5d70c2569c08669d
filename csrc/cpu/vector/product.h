// C = A B and C += A B for small fp32 matrices in cache, A as it lies or transposed, B in panels.

#pragma once

#include "vector.h"

namespace fastpeft {
namespace {

// Columns of a panel. A panel of B holds that many of its columns, row after row; the last is filled up with zeros
// to whole vectors.
constexpr int64_t kPanel = 2 * kWidth;

// Rows of C that lie in registers, two vectors each; and how many of them the last rows are filled up to.
#if defined(__AVX512F__)
constexpr int kRows = 12, kFewer = 4;
#else
constexpr int kRows = 6, kFewer = 2;
#endif

FASTPEFT_INLINE int64_t whole_rows(int64_t count) { return ceil_div<int64_t>(count, kFewer) * kFewer; }

// `rows` rows by `vectors` vectors of C. Element (r, k) of A is at a[r * lda + k], or transposed at a[k * lda + r].
template <int rows, int vectors, bool transposed, bool adds>
void tile(int64_t depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc) {
  Floats sums[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[r][v] = Floats{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = load(b + k * kPanel + v * kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Floats left = all(transposed ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      float* place = c + r * ldc + v * kWidth;
      // Last, so that long sums are sums of short ones, whose errors do not grow as much.
      store(place, adds ? load(place) + sums[r][v] : sums[r][v]);
    }
}

template <int vectors, bool transposed, bool adds>
void tiles(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc) {
  const int64_t step = transposed ? 1 : lda;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    tile<kRows, vectors, transposed, adds>(depth, a + r * step, lda, b, c + r * ldc, ldc);
  for (; r < rows; r += kFewer)
    tile<kFewer, vectors, transposed, adds>(depth, a + r * step, lda, b, c + r * ldc, ldc);
}

// As much depth as a panel may have to stay in the first cache.
constexpr int64_t kDepth = 256;

template <bool transposed, bool adds>
FASTPEFT_INLINE void multiply_piece(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
                                    const float* b, int64_t height, float* c, int64_t ldc) {
  int64_t j = 0;
  for (; columns - j > kWidth; j += kPanel)
    tiles<2, transposed, adds>(rows, depth, a, lda, b + j * height, c + j, ldc);
  if (j < columns) tiles<1, transposed, adds>(rows, depth, a, lda, b + j * height, c + j, ldc);
}

// `rows` rows and `columns` columns of C, of which whole_rows and whole vectors are read of A and written. `b` holds panels
// of `height` rows, the first `depth` of which enter.
template <bool transposed, bool adds>
FASTPEFT_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                              int64_t height, float* c, int64_t ldc) {
  multiply_piece<transposed, adds>(rows, columns, smaller(depth, kDepth), a, lda, b, height, c, ldc);
  for (int64_t k = kDepth; k < depth; k += kDepth)
    multiply_piece<transposed, true>(rows, columns, smaller(depth - k, kDepth), a + k * (transposed ? lda : 1), lda,
                                     b + k * kPanel, height, c, ldc);
}

FASTPEFT_INLINE int64_t whole_panels(int64_t count) { return ceil_div<int64_t>(count, kPanel) * kPanel; }

// A row in fp32, filled up with zeros to whole vectors.
template <class T>
FASTPEFT_INLINE void put_row(const T* row, int64_t count, float* out) {
  over(count, [&](int64_t i, auto how, int) { store(out + i, load(row + i, how)); });
}

// Rows that products take besides `count`: what was there before may be numbers that are slow to compute with.
FASTPEFT_INLINE void zero_rows(float* rows, int64_t count, int64_t width) {
  __builtin_memset(rows + count * width, 0, (whole_rows(count) - count) * width * sizeof(float));
}

// Row `r` of a right factor of `height` rows and `count` columns into its panels.
template <class T>
FASTPEFT_INLINE void put_panels(const T* row, int64_t count, int64_t r, int64_t height, float* out) {
  over(count, [&](int64_t i, auto how, int) {
    store(out + (i / kPanel * height + r) * kPanel + i % kPanel, load(row + i, how));
  });
}

// kWidth rows that become columns of a right factor, from `column` on, into its panels of `count` rows. A row that is null
// is zero.
template <class T>
FASTPEFT_INLINE void put_columns(const T* const rows[kWidth], int64_t count, int64_t column, float* out) {
  out += column / kPanel * count * kPanel + column % kPanel;
  over(count, [&](int64_t i, auto how, int) {
    Floats r[kWidth];
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) r[k] = rows[k] == nullptr ? Floats{} : load(rows[k] + i, how);
    transpose(r);
    const int64_t end = smaller<int64_t>(kWidth, count - i);
    for (int64_t k = 0; k < end; ++k) store(out + (i + k) * kPanel, r[k]);
  });
}

}  // namespace
}  // namespace fastpeft
