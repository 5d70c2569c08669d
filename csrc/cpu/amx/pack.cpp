// A right factor in the order in which the matrix unit reads it.
//
// pack turns W (columns x depth, as torch keeps a linear layer's weight) into panels of 32 columns; a panel holds its
// depth in blocks of 32, each two tiles of 16 columns, each 16 rows of pairs (k, k + 1):
//
//   number (n, k) is at (n / 32 * (depth / 32) + k / 32) * 1024 + (n % 32 / 16) * 512 + (k % 32 / 2) * 32 + (n % 16) * 2 + k % 2
//
// Rows and columns that are missing to a multiple of 32 are zero. A scale for each k folds a LayerNorm's weight in.

#include "avx512.h"
#include "tile.h"

namespace fastpeft {
namespace {

struct Source {
  const void* data;  // fp32 or bf16
  int64_t row, column;  // distance of rows (n) and columns (k), in numbers
  const float* column_scale;
  const float* row_scale;
  bool wide;

  FASTPEFT_INLINE float at(int64_t n, int64_t k) const {
    const int64_t i = n * row + k * column;
    float x;
    if (wide) {
      x = static_cast<const float*>(data)[i];
    } else {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const bf16*>(data)[i]) << 16;
      std::memcpy(&x, &bits, 4);
    }
    if (column_scale != nullptr) x *= column_scale[k];
    if (row_scale != nullptr) x *= row_scale[n];
    return x;
  }
};

}  // namespace
}  // namespace fastpeft

// data: numbers (n, k) at n * row + k * column. wide: fp32, else bf16. column_scale: of each k, or null; row_scale: of each
// n, or null. out: ceil(columns / 32) * ceil(depth / 32) * 1024 numbers.
FASTPEFT_EXPORT int32_t FASTPEFT_NAME(pack)(const void* data, int64_t columns, int64_t depth, int64_t row, int64_t column,
                                            int32_t wide, const float* column_scale, const float* row_scale,
                                            uint16_t* out, int32_t threads) {
  using namespace fastpeft;
  const Source source = {data, row, column, column_scale, row_scale, wide != 0};
  const int64_t panels = ceil_div(columns, kBlock), steps = ceil_div(depth, kBlock);
  const int parts = team(threads, panels);
  parallel(parts, [&](int index) {
    const Range mine = part_of(panels, parts, index);
    for (int64_t p = mine.begin; p < mine.end; ++p)
      for (int64_t s = 0; s < steps; ++s) {
        alignas(64) float block[kBlock][kBlock];  // k, n
        for (int64_t n = 0; n < kBlock; ++n)
          for (int64_t k = 0; k < kBlock; ++k) {
            const bool inside = p * kBlock + n < columns && s * kBlock + k < depth;
            block[k][n] = inside ? source.at(p * kBlock + n, s * kBlock + k) : 0.0f;
          }
        bf16* to = out + (p * steps + s) * kBlockSize;
        for (int64_t k = 0; k < kBlock; k += 2) {
          const __m512i even = narrow(_mm512_load_ps(block[k]), _mm512_load_ps(block[k] + 16));
          const __m512i odd = narrow(_mm512_load_ps(block[k + 1]), _mm512_load_ps(block[k + 1] + 16));
          __m512i first, second;
          interleave(even, odd, &first, &second);
          _mm512_store_si512(to + k * 16, first);
          _mm512_store_si512(to + 512 + k * 16, second);
        }
      }
  });
  return kOk;
}
