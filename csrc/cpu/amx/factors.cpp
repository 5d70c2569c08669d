// Gradients of a narrow factor: out = left^T right, left (rows x 32 n), right (rows x columns), out in fp32. Rows are the
// depth of the product, so right's pairs of rows are interleaved on their way to the matrix unit, each once. A
// part of the rows, read from end to end, is a thread's; it goes through them in groups, whose numbers stay in the
// second-level cache with all its sums.

#include "attention.h"
#include "epilogues.h"

namespace fastpeft {

struct Factors {
  int64_t rows, width, columns;  // width and columns are multiples of 32
  Matrix left, right;
  const float* statistics;  // of right's rows, which are then normalised; or null
  float* out;               // parts x width x columns: sums over a part of the rows each
  int64_t parts;
  int32_t threads;
};

namespace {

constexpr int64_t kSumBytes = 512 * 1024;    // of the sums that stay in the second-level cache
constexpr int64_t kGroupBytes = 384 * 1024;  // of a group of right's rows there

struct LeftTag;
struct RightTag;
struct SumsTag;

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

// Asks for a block of right that is read a row of blocks later: the processor does not foresee 32 rows at once.
FASTPEFT_INLINE void prefetch(const Factors& f, int64_t row_block, int64_t column_block) {
  const int64_t count = smaller(kBlock, f.rows - row_block * kBlock);
  if (f.right.layout == kWide) {
    for (int64_t r = 0; r < count; ++r) {
      const float* p = wide_place(f.right, row_block, r, column_block);
      _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(p + 16), _MM_HINT_T1);
    }
    return;
  }
  const auto* p = reinterpret_cast<const char*>(place(f.right, row_block, 0, column_block));
  const int64_t stride = f.right.layout == kBlocked ? kBlock * 2 : f.right.stride * 2;
  for (int64_t r = 0; r < count; ++r) _mm_prefetch(p + r * stride, _MM_HINT_T1);
}

struct Memory {
  bf16 *left, *right;
  float* sums;
};

// The sums of some columns, few enough to stay near, over some blocks of rows.
void run(const Factors& f, Range mine, Range row_blocks, int64_t group, float* out_part, const Memory& memory) {
  const int64_t wide = f.width / kBlock, count = mine.end - mine.begin;
  __m512i rows[kBlock];
  for (int64_t first = row_blocks.begin; first < row_blocks.end; first += group) {
    const int64_t steps = smaller(group, row_blocks.end - first);
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t w = 0; w < wide; ++w) {
        load_block(f.left, f.rows, first + k, w, rows);
        put_left_transposed(rows, memory.left + (w * group + k) * kBlockSize);
      }
      for (int64_t n = 0; n < count; ++n) {
        if (first + k + 1 < row_blocks.end) prefetch(f, first + k + 1, mine.begin + n);
        if (f.statistics == nullptr)
          load_block(f.right, f.rows, first + k, mine.begin + n, rows);
        else
          load_normalised(f, first + k, mine.begin + n, rows);
        put_right(rows, memory.right + (n * group + k) * kBlockSize);
      }
    }
    const bool begins = first == row_blocks.begin;
    const auto sums = [&](int64_t i) { return i < count * wide ? memory.sums + i * kSums : nullptr; };
    if (begins)
      zero_sums();
    else
      load_sums(memory.sums);
    for (int64_t i = 0; i < count * wide; ++i) {
      for (int64_t k = 0; k < steps; ++k)
        multiply_step(memory.left + (i % wide * group + k) * kBlockSize, memory.right + (i / wide * group + k) * kBlockSize);
      swap_sums(sums(i), begins ? nullptr : sums(i + 1));
    }
  }
  for (int64_t n = 0; n < count; ++n)
    for (int64_t w = 0; w < wide; ++w)
      for (int64_t r = 0; r < kBlock; ++r) {
        const Row s = sums_of(memory.sums + (n * wide + w) * kSums, r);
        float* out = out_part + (w * kBlock + r) * f.columns + (mine.begin + n) * kBlock;
        _mm512_storeu_ps(out, s.low);
        _mm512_storeu_ps(out + 16, s.high);
      }
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(factors)(const fastpeft::Factors* factors) {
  using namespace fastpeft;
  const Factors& f = *factors;
  bool enough = true;
  const int64_t wide = f.width / kBlock, columns = f.columns / kBlock, depth = ceil_div(f.rows, kBlock);
  parallel(static_cast<int>(smaller<int64_t>(f.threads, f.parts)), [&](int thread) {
    const int64_t fit = kSumBytes / (wide * kSums * 4), most = fit < 1 ? 1 : fit;
    const int64_t panels = ceil_div(columns, most), widest = ceil_div(columns, panels);
    const int64_t near = kGroupBytes / (widest * kBlockSize * 2), group = near < 1 ? 1 : near;
    const Memory memory = {static_cast<bf16*>(scratch<LeftTag>(wide * group * kBlockSize * 2)),
                           static_cast<bf16*>(scratch<RightTag>(widest * group * kBlockSize * 2)),
                           static_cast<float*>(scratch<SumsTag>(widest * wide * kSums * 4))};
    if (memory.left == nullptr || memory.right == nullptr || memory.sums == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Tiles tiles;
    // Sums belong to a part, not to a thread: there may be fewer threads than were asked for.
    for (int64_t part = thread; part < f.parts; part += smaller<int64_t>(f.threads, f.parts))
      for (int64_t panel = 0; panel < panels; ++panel)
        run(f, part_of(columns, panels, panel), part_of(depth, f.parts, part), group,
            f.out + part * f.width * f.columns, memory);
  });
  return enough ? kOk : kNoMemory;
}
