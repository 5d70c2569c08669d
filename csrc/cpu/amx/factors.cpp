// Gradients of a narrow factor: out = left^T right, left (rows x 32 n), right (rows x columns), out in fp32. Rows are the
// depth of the product, so right's pairs of rows are interleaved on their way to the matrix unit, each once, and four
// blocks of columns at a time: a row-major matrix is read in pieces of four lines.

#include "attention.h"
#include "epilogues.h"

namespace fastpeft {

struct Factors {
  int64_t rows, width, columns;  // width and columns are multiples of 32
  Matrix left, right;
  const float* statistics;  // of right's rows, which are then normalised; or null
  float* out;               // width x columns
  int32_t threads;
};

namespace {

constexpr int64_t kPanels = 4;

struct LeftTag;
struct RightTag;

// 32 rows of a block of columns; zero behind the last row.
FASTPEFT_INLINE void load_block(const Matrix& m, int64_t rows, int64_t row_block, int64_t column_block, __m512i out[kBlock]) {
  const int64_t count = smaller(kBlock, rows - row_block * kBlock);
  for (int64_t r = 0; r < count; ++r) out[r] = read_narrow(m, row_block, r, column_block);
  for (int64_t r = count; r < kBlock; ++r) out[r] = _mm512_setzero_si512();
}

FASTPEFT_INLINE void load_normalised(const Factors& f, int64_t row_block, int64_t column_block, __m512i out[kBlock]) {
  const int64_t count = smaller(kBlock, f.rows - row_block * kBlock);
  for (int64_t r = 0; r < count; ++r) {
    const float mean = f.statistics[row_block * kBlock + r], rstd = f.statistics[f.rows + row_block * kBlock + r];
    const __m512 s = constant(rstd), shift = constant(-mean * rstd);
    const Row x = read(f.right, row_block, r, column_block);
    out[r] = narrow(_mm512_fmadd_ps(x.low, s, shift), _mm512_fmadd_ps(x.high, s, shift));
  }
  for (int64_t r = count; r < kBlock; ++r) out[r] = _mm512_setzero_si512();
}

void run(const Factors& f, Range mine, bf16* left, bf16* right) {
  const int64_t depth = ceil_div(f.rows, kBlock), wide = f.width / kBlock;
  __m512i rows[kBlock];
  alignas(64) float sums[kSums];
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t w = 0; w < wide; ++w) {
      load_block(f.left, f.rows, k, w, rows);
      put_left_transposed(rows, left + (w * depth + k) * kBlockSize);
    }
  for (int64_t first = mine.begin; first < mine.end; first += kPanels) {
    const int64_t count = smaller(kPanels, mine.end - first);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < count; ++n) {
        if (f.statistics == nullptr)
          load_block(f.right, f.rows, k, first + n, rows);
        else
          load_normalised(f, k, first + n, rows);
        put_right(rows, right + (n * depth + k) * kBlockSize);
      }
    for (int64_t n = 0; n < count; ++n)
      for (int64_t w = 0; w < wide; ++w) {
        zero_sums();
        for (int64_t k = 0; k < depth; ++k)
          multiply_step(left + (w * depth + k) * kBlockSize, right + (n * depth + k) * kBlockSize);
        store_sums(sums);
        for (int64_t r = 0; r < kBlock; ++r) {
          const Row s = sums_of(sums, r);
          float* out = f.out + (w * kBlock + r) * f.columns + (first + n) * kBlock;
          _mm512_storeu_ps(out, s.low);
          _mm512_storeu_ps(out + 16, s.high);
        }
      }
  }
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(factors)(const fastpeft::Factors* factors) {
  using namespace fastpeft;
  const Factors& f = *factors;
  const int64_t threads = smaller<int64_t>(f.threads, f.columns / kBlock);
  bool enough = true;
  parallel(static_cast<int>(threads), [&](int index) {
    const int64_t depth = ceil_div(f.rows, kBlock);
    auto* left = static_cast<bf16*>(scratch<LeftTag>(depth * f.width * kBlock * 2));
    auto* right = static_cast<bf16*>(scratch<RightTag>(depth * kPanels * kBlockSize * 2));
    if (left == nullptr || right == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Tiles tiles;
    run(f, part_of(f.columns / kBlock, threads, index), left, right);
  });
  return enough ? kOk : kNoMemory;
}
