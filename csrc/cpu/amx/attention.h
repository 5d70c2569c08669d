// out = softmax(scale * q [k; prompt_k]^T) [v; prompt_v], and its gradients. fastpeft/native/attention.py lays this out.

#pragma once

#include "avx512.h"
#include "gemm.h"
#include "tile.h"

namespace fastpeft {

// Rows of all heads of a batch. Row-major: row i of head h of sample b begins at data + b * batch + h * head + i * row.
// Blocked: a blocked matrix whose row b * batch + i holds, from column `head` on, the heads one after another, `row` blocks
// of 32 columns in a row of blocks; dim is then a multiple of 16.
struct Heads {
  bf16* data;
  int64_t batch, head, row;
  int32_t layout;
  int32_t unused;
};

struct Attention {
  int64_t batch, heads, queries, tokens, prompts, dim;
  Heads q, k, v, prompt_k, prompt_v;  // a batch distance of 0: prompts that the batch shares
  Heads out;
  float* lse;  // (batch, heads, queries), natural logarithm
  float scale;
  int32_t threads;
  // Backward. Data that is null is not needed.
  Heads dout, dq, dk, dv;
  Heads dprompt_k, dprompt_v;  // of prompts of each sample's own
  // Of prompts that the batch shares, (parts, heads, prompts, dim): sums over a part of the batch each, added to.
  float *prompt_k_sums, *prompt_v_sums;
  int64_t parts;
  const int32_t* lengths;  // tokens of each sample that are seen, (batch,), at least one key each; null for all
};

FASTPEFT_INLINE bf16* piece_of(const Heads& m, int64_t dim, int64_t b, int64_t h, int64_t i, int64_t column) {
  if (m.layout == kRowMajor) return m.data + b * m.batch + h * m.head + i * m.row + column;
  const int64_t r = b * m.batch + i, c = m.head + h * dim + column;
  return m.data + ((r / kBlock) * m.row + c / kBlock) * kBlockSize + (r % kBlock) * kBlock + c % kBlock;
}

// Columns [column, column + 32) of a row; zero from `dim` on.
FASTPEFT_INLINE __m512i load_piece(const Heads& m, int64_t dim, int64_t b, int64_t h, int64_t i, int64_t column) {
  if (m.layout == kRowMajor) {
    const int64_t count = dim - column;
    const __mmask32 mask = count >= kBlock ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    return _mm512_maskz_loadu_epi16(mask, piece_of(m, dim, b, h, i, column));
  }
  const auto half = [&](int64_t at) {
    if (at >= dim) return _mm256_setzero_si256();
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(piece_of(m, dim, b, h, i, at)));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(column)), half(column + 16), 1);
}

FASTPEFT_INLINE void store_piece(const Heads& m, int64_t dim, int64_t b, int64_t h, int64_t i, int64_t column, __m512i x) {
  if (m.layout == kRowMajor) {
    const int64_t count = dim - column;
    const __mmask32 mask = count >= kBlock ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    _mm512_mask_storeu_epi16(piece_of(m, dim, b, h, i, column), mask, x);
    return;
  }
  const auto half = [&](int64_t at, __m256i y) {
    if (at < dim) _mm256_storeu_si256(reinterpret_cast<__m256i*>(piece_of(m, dim, b, h, i, at)), y);
  };
  half(column, _mm512_castsi512_si256(x));
  half(column + 16, _mm512_extracti64x4_epi64(x, 1));
}

// Whether columns [column, column + 32) of every row are 64 bytes in a piece.
FASTPEFT_INLINE bool in_lines(const Heads& m, int64_t dim, int64_t h, int64_t column) {
  if (dim - column < kBlock) return false;
  return m.layout == kRowMajor || (m.head + h * dim + column) % kBlock == 0;
}

// Calls with(r, line) for the lines of rows [i, i + count), where `in_lines`: at most two runs of even distance.
template <class With>
FASTPEFT_INLINE void each_line(const Heads& m, int64_t dim, int64_t b, int64_t h, int64_t i, int64_t count, int64_t column,
                               const With& with) {
  bf16* line = piece_of(m, dim, b, h, i, column);
  if (m.layout == kRowMajor) {
    for (int64_t r = 0; r < count; ++r, line += m.row) with(r, line);
    return;
  }
  const int64_t here = smaller(count, kBlock - (b * m.batch + i) % kBlock);
  for (int64_t r = 0; r < here; ++r, line += kBlock) with(r, line);
  line += (m.row - 1) * kBlockSize;
  for (int64_t r = here; r < count; ++r, line += kBlock) with(r, line);
}

// Stores columns [column, column + 32) of rows [i, i + count): those of row r are row(r).
template <class RowOf>
FASTPEFT_INLINE void store_pieces(const Heads& m, int64_t dim, int64_t b, int64_t h, int64_t i, int64_t count,
                                  int64_t column, const RowOf& row) {
  if (in_lines(m, dim, h, column)) {
    each_line(m, dim, b, h, i, count, column, [&](int64_t r, bf16* line) { _mm512_storeu_si512(line, row(r)); });
    return;
  }
  for (int64_t r = 0; r < count; ++r) store_piece(m, dim, b, h, i + r, column, row(r));
}

// Rows of a head that follow on each other: tokens, then prompts, then zeros.
struct Source {
  const Heads *tokens, *prompts;
  int64_t dim, b, h, token_rows, prompt_rows;

  FASTPEFT_INLINE __m512i piece(int64_t i, int64_t column) const {
    if (i < token_rows) return load_piece(*tokens, dim, b, h, i, column);
    if (i < token_rows + prompt_rows) return load_piece(*prompts, dim, b, h, i - token_rows, column);
    return _mm512_setzero_si512();
  }
  FASTPEFT_INLINE void rows(int64_t block, int64_t column, __m512i out[kBlock]) const {
    const int64_t first = block * kBlock;
    int64_t done = 0;
    if (first < token_rows && in_lines(*tokens, dim, h, column)) {
      done = smaller(kBlock, token_rows - first);
      each_line(*tokens, dim, b, h, first, done, column, [&](int64_t r, const bf16* line) { out[r] = opaque(_mm512_loadu_si512(line)); });
    }
    for (int64_t r = done; r < kBlock; ++r) out[r] = piece(first + r, column);
  }
};

// The forms in which 32 rows by 32 columns of a head enter a product. Each is 2 KiB.

// Left factor: rows as they are.
FASTPEFT_INLINE void put_left(const __m512i rows[kBlock], bf16* out) {
  for (int64_t r = 0; r < kBlock; ++r) _mm512_store_si512(out + r * kBlock, opaque(rows[r]));
}

// Right factor whose columns are the rows: doublewords transposed.
FASTPEFT_INLINE void put_right_transposed(const __m512i rows[kBlock], bf16* out) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) t[r] = rows[half * 16 + r];
    transpose(t);
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) _mm512_store_si512(out + half * 512 + r * kBlock, t[r]);
  }
}

// Right factor whose depth are the rows: pairs of rows interleaved.
FASTPEFT_INLINE void put_right(const __m512i rows[kBlock], bf16* out) {
#pragma GCC unroll 4
  for (int64_t r = 0; r < kBlock; r += 2) {
    __m512i first, second;
    interleave(rows[r], rows[r + 1], &first, &second);
    _mm512_store_si512(out + r * 16, first);
    _mm512_store_si512(out + 512 + r * 16, second);
  }
}

// Left factor whose rows are the columns: interleaved, then transposed.
FASTPEFT_INLINE void put_left_transposed(const __m512i rows[kBlock], bf16* out) {
  __m512i first[16], second[16];
#pragma GCC unroll 16
  for (int64_t r = 0; r < 16; ++r) interleave(rows[2 * r], rows[2 * r + 1], &first[r], &second[r]);
  transpose(first);
  transpose(second);
#pragma GCC unroll 16
  for (int64_t r = 0; r < 16; ++r) {
    _mm512_store_si512(out + r * kBlock, first[r]);
    _mm512_store_si512(out + (16 + r) * kBlock, second[r]);
  }
}

// Rows and columns of a head in blocks, and how many of each there are.
struct Extent {
  int64_t queries, keys, widths;
  explicit Extent(const Attention& a)
      : queries(ceil_div(a.queries, kBlock)), keys(ceil_div(a.tokens + a.prompts, kBlock)), widths(ceil_div(a.dim, kBlock)) {}
};

// The call as one sample sees it.
FASTPEFT_INLINE Attention of_sample(const Attention& a, int64_t b) {
  Attention own = a;
  if (a.lengths != nullptr) own.tokens = a.lengths[b];
  return own;
}

// Whether every sample sees tokens that there are, and at least one key.
FASTPEFT_INLINE bool lengths_fit(const Attention& a) {
  if (a.lengths == nullptr) return true;
  for (int64_t b = 0; b < a.batch; ++b)
    if (a.lengths[b] < 0 || a.lengths[b] > a.tokens || a.lengths[b] + a.prompts < 1) return false;
  return true;
}

// A part of a scratch memory.
FASTPEFT_INLINE bf16* take(bf16*& memory, int64_t blocks) {
  bf16* mine = memory;
  memory += blocks * kBlockSize;
  return mine;
}

}  // namespace fastpeft
