// Reading and writing 32 columns of a row of a matrix, whichever its layout.

#pragma once

#include "avx512.h"
#include "gemm.h"
#include "tile.h"

namespace fastpeft {

struct Row {
  __m512 low, high;  // columns 0..15 and 16..31
};

FASTPEFT_INLINE bf16* place(const Matrix& m, int64_t row_block, int64_t row, int64_t column_block) {
  if (m.layout == kBlocked) return m.data + (row_block * m.stride + column_block) * kBlockSize + row * kBlock;
  return m.data + (row_block * kBlock + row) * m.stride + column_block * kBlock;
}

FASTPEFT_INLINE float* wide_place(const Matrix& m, int64_t row_block, int64_t row, int64_t column_block) {
  return reinterpret_cast<float*>(m.data) + (row_block * kBlock + row) * m.stride + column_block * kBlock;
}

FASTPEFT_INLINE Row read(const Matrix& m, int64_t row_block, int64_t row, int64_t column_block) {
  if (m.layout == kWide) {
    const float* p = wide_place(m, row_block, row, column_block);
    return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)};
  }
  const __m512i x = _mm512_loadu_si512(place(m, row_block, row, column_block));
  return {low_half(x), high_half(x)};
}

// As the matrix unit takes it.
FASTPEFT_INLINE __m512i read_narrow(const Matrix& m, int64_t row_block, int64_t row, int64_t column_block) {
  if (m.layout == kWide) {
    const Row x = read(m, row_block, row, column_block);
    return narrow(x.low, x.high);
  }
  return _mm512_loadu_si512(place(m, row_block, row, column_block));
}

FASTPEFT_INLINE void write(const Matrix& m, int64_t row_block, int64_t row, int64_t column_block, Row x) {
  if (m.layout == kWide) {
    float* p = wide_place(m, row_block, row, column_block);
    _mm512_storeu_ps(p, x.low);
    _mm512_storeu_ps(p + 16, x.high);
  } else {
    _mm512_storeu_si512(place(m, row_block, row, column_block), narrow(x.low, x.high));
  }
}

}  // namespace fastpeft
