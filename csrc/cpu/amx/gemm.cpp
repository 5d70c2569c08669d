// C = epilogue(A W^T + A2 W2^T) on the matrix unit.
//
// A thread owns a range of row blocks and goes through it in slabs whose part of A stays in the second-level cache. Within
// a slab a panel of W, 32 columns, is used for all rows before the next is loaded, and it is used in chunks of depth that
// stay in the first-level cache. Sums that wait for the next chunk lie in fp32:
//
//   shallow products (depth to 1024): for each panel, for each chunk, for each block of rows; 4 KiB of sums a block;
//   deep ones: for each chunk, for each panel, for each block, so that A too is read in chunks; sums of the whole slab.
//
// Few rows are not dealt out but the panels of W: every thread then reads a part of W, which comes from memory, once, and
// asks for what it will need next while it multiplies.
//
// A panel's sums are finished (bias, activation, ...) between the steps of the next panel's products.

#include "gemm.h"

#include "epilogues.h"

namespace fastpeft {
namespace {

constexpr int64_t kChunk = 256;        // depth of a panel in the first-level cache: 16 KiB
constexpr int64_t kLongChunk = 768;     // the same of few rows
constexpr int64_t kShallow = 1024;     // deepest product whose slab of A is held whole
constexpr int64_t kSlab = 704 * 1024;  // bytes of A (and of sums) that share the second-level cache with a panel
constexpr int64_t kLight = 256 * 1024;  // bytes of a W that stays there whole, beside A's and C's rows
constexpr int64_t kFew = 8;             // blocks of rows that are not dealt out
constexpr int64_t kAsking = 8;         // blocks of rows of a slab for which W comes too fast for the machine to foresee
constexpr int64_t kAhead = 16;          // blocks of W between those that are multiplied and those that are asked for

struct SlabTag;
struct SumsTag;
struct StagedTag;

// Sums of a panel that wait to be finished, which happens evenly over the steps of the next panel: a product that ends in
// an expensive function keeps the matrix unit busy all the while.
class Pipeline {
 public:
  Pipeline(const Gemm& gemm, Finish finish) : finish_(finish) { waiting_.gemm = &gemm; }

  // Multiplies `steps` blocks of A and B into the tiles, finishing what waits meanwhile. `asks`: for later blocks of B.
  FASTPEFT_INLINE void multiply(const bf16* a, const bf16* b, int64_t steps, bool asks = false) {
    for (int64_t k = 0; k < steps; ++k) {
      if (asks) ask_for(b + (k + kAhead) * kBlockSize);
      multiply_step(a + k * kBlockSize, b + k * kBlockSize);
      if (row_ < rows_) {
        credit_ += quota_;
        some(smaller(credit_ >> kFraction, rows_));
      }
    }
  }

  // Takes over the sums of a panel: `blocks` blocks of rows, to be finished within so many steps.
  void hand_over(int64_t row_block, int64_t column_block, const float* sums, int64_t blocks, int64_t steps) {
    flush();
    sums_ = sums;
    first_ = row_block;
    waiting_.column_block = column_block;
    rows_ = blocks * kBlock;
    quota_ = ceil_div(rows_ << kFraction, steps);
    row_ = credit_ = 0;
  }

  void flush() {
    if (row_ < rows_) some(rows_);
  }

 private:
  static constexpr int kFraction = 16;

  FASTPEFT_INLINE static void ask_for(const bf16* block) {
#pragma GCC unroll 32
    for (int64_t line = 0; line < kBlockSize; line += 32) _mm_prefetch(reinterpret_cast<const char*>(block + line), _MM_HINT_T1);
  }

  FASTPEFT_INLINE void some(int64_t end) {
    while (row_ < end) {
      const int64_t block = row_ / kBlock, r = row_ % kBlock, count = smaller(kBlock - r, end - row_);
      waiting_.sums = sums_ + block * kSums;
      waiting_.row_block = first_ + block;
      finish_(waiting_, r, r + count);
      row_ += count;
    }
  }

  Finished waiting_ = {};
  Finish finish_;
  const float* sums_ = nullptr;
  int64_t first_ = 0, rows_ = 0, row_ = 0, quota_ = 0, credit_ = 0;
};

// Rows [32 block, 32 block + 32) of A as blocks of 32 columns, normalised on the way. Rows that there are not are zero.
void load_rows(const Gemm& g, int64_t block, bf16* out) {
  const int64_t blocks = g.depth / kBlock;
  for (int64_t r = 0; r < kBlock; ++r) {
    const int64_t row = block * kBlock + r;
    if (row >= g.rows) {
      for (int64_t k = 0; k < blocks; ++k) _mm512_store_si512(out + k * kBlockSize + r * kBlock, _mm512_setzero_si512());
      continue;
    }
    if (g.prologue == kCopy) {
      for (int64_t k = 0; k < blocks; ++k)
        _mm512_store_si512(out + k * kBlockSize + r * kBlock, read_narrow(g.a, block, r, k));
      continue;
    }
    __m512 sum = _mm512_setzero_ps(), sum2 = _mm512_setzero_ps();
    for (int64_t k = 0; k < blocks; ++k) {
      const Row x = read(g.a, block, r, k);
      sum = _mm512_add_ps(sum, x.low);
      sum2 = _mm512_add_ps(sum2, x.high);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum, sum2)) / g.depth;
    const __m512 m = constant(mean);
    sum = sum2 = _mm512_setzero_ps();
    for (int64_t k = 0; k < blocks; ++k) {
      const Row x = read(g.a, block, r, k);
      const __m512 low = _mm512_sub_ps(x.low, m), high = _mm512_sub_ps(x.high, m);
      sum = _mm512_fmadd_ps(low, low, sum);
      sum2 = _mm512_fmadd_ps(high, high, sum2);
    }
    const float variance = _mm512_reduce_add_ps(_mm512_add_ps(sum, sum2)) / g.depth;
    const float rstd = 1.0f / __builtin_sqrtf(variance + g.epsilon);
    const __m512 s = constant(rstd), shift = constant(-mean * rstd);
    for (int64_t k = 0; k < blocks; ++k) {
      const Row x = read(g.a, block, r, k);
      const __m512 low = _mm512_fmadd_ps(x.low, s, shift), high = _mm512_fmadd_ps(x.high, s, shift);
      _mm512_store_si512(out + k * kBlockSize + r * kBlock, narrow(low, high));
    }
    if (g.statistics != nullptr) {
      g.statistics[row] = mean;
      g.statistics[g.rows + row] = rstd;
    }
  }
}

// A slab of A: its blocks, in scratch memory or where they are.
struct Slab {
  const bf16* data;
  int64_t stride;  // blocks from one row of blocks to the next
  FASTPEFT_INLINE const bf16* at(int64_t row_block, int64_t k) const { return data + (row_block * stride + k) * kBlockSize; }
};

// A2 = act(A down_weight^T + down_bias) for the slab's rows.
void project_down(const Gemm& g, const Slab& slab, int64_t first, int64_t blocks) {
  const int64_t depth = g.depth / kBlock;
  alignas(64) float sums[kSums];
  Gemm down = {};
  down.rows = g.rows;
  down.columns = g.down;
  down.c = g.a2;
  down.bias = g.down_bias;
  down.epilogue = g.down_activation == kIdentity && g.down_slopes == nullptr ? kStore : kActivate;
  down.activation = g.down_activation;
  down.keep = g.down_slopes == nullptr ? kNothing : kSlope16;
  down.kept = g.down_slopes;
  const Finish finish = choose_finish(down);
  for (int64_t n = 0; n < g.down / kBlock; ++n)
    for (int64_t i = 0; i < blocks; ++i) {
      zero_sums();
      for (int64_t k = 0; k < depth; ++k) multiply_step(slab.at(i, k), g.down_weight + (n * depth + k) * kBlockSize);
      store_sums(sums);
      finish({&down, sums, first + i, n}, 0, kBlock);
    }
}

// Carries finished rows from blocks to row-major memory, with what is to be added, while the next slab is multiplied. A
// product writes 64 bytes of a row at a time; into row-major memory that would be a new page each.
class Drain {
 public:
  Drain(const Gemm& gemm, bf16* memory, int64_t blocks, Range panels)
      : gemm_(gemm), memory_(memory), half_(blocks * kBlock * gemm.columns), panels_(panels) {}

  // Where the next slab's sums go, so that block `first` of rows lies at its beginning.
  bf16* turn(int64_t first) { return memory_ + (filling_ ? half_ : 0) - first * kBlock * gemm_.columns; }

  // The slab that was filled is complete: carry it away, a part of it at each of so many calls of `some`.
  void start(int64_t first, int64_t blocks, int64_t calls) {
    finish();
    first_ = first;
    row_ = 0;
    rows_ = smaller(blocks * kBlock, gemm_.rows - first * kBlock);
    step_ = ceil_div(rows_, calls);
    source_ = memory_ + (filling_ ? half_ : 0);
    filling_ = !filling_;
  }

  FASTPEFT_INLINE void some() {
    if (row_ < rows_) carry(smaller(row_ + step_, rows_));
  }

  void finish() {
    if (row_ < rows_) carry(rows_);
  }

 private:
  void carry(int64_t end) {
    const int64_t columns = gemm_.columns / kBlock;
    for (; row_ < end; ++row_) {
      const int64_t block = row_ / kBlock, r = row_ % kBlock;
      for (int64_t n = panels_.begin; n < panels_.end; ++n) {
        const __m512i packed = _mm512_load_si512(source_ + (block * columns + n) * kBlockSize + r * kBlock);
        Row x = {low_half(packed), high_half(packed)};
        if (gemm_.epilogue == kResidual) {
          const Row y = read(gemm_.other, first_ + block, r, n);
          x = {_mm512_add_ps(x.low, y.low), _mm512_add_ps(x.high, y.high)};
          if (gemm_.another.data != nullptr) {
            const Row z = read(gemm_.another, first_ + block, r, n);
            x = {_mm512_add_ps(x.low, z.low), _mm512_add_ps(x.high, z.high)};
          }
        }
        write(gemm_.c, first_ + block, r, n, x);
      }
    }
  }

  const Gemm& gemm_;
  bf16* memory_;
  const bf16* source_ = nullptr;
  int64_t half_, first_ = 0, row_ = 0, rows_ = 0, step_ = 0;
  Range panels_;
  bool filling_ = false;
};

// Products of a panel's chunk with a block of rows in a slab.
int64_t products(const Gemm& g, int64_t blocks, Range panels, bool few) {
  return ceil_div(g.depth, few ? kLongChunk : kChunk) * (panels.end - panels.begin) * blocks;
}

void multiply_slab(const Gemm& g, const Slab& slab, int64_t first, int64_t blocks, Range panels, bool few,
                   Pipeline& pipeline, Drain& drain, float* sums) {
  const int64_t depth = g.depth / kBlock, extra = g.extra / kBlock;
  const bool shallow = few || g.depth <= kShallow;
  const int64_t chunk = (few ? kLongChunk : kChunk) / kBlock, chunks = ceil_div(depth, chunk);
  // A panel's chunk with all blocks of rows.
  const auto sweep = [&](int64_t c, int64_t n) {
    const int64_t begin = c * chunk, steps = smaller(chunk, depth - begin);
    // In shallow products a panel's sums are finished while the next panel's come in.
    float* partial = sums + (shallow ? n % 2 : n) * blocks * kSums;
    if (c == 0)
      zero_sums();
    else
      load_sums(partial);
    for (int64_t i = 0; i < blocks; ++i) {
      pipeline.multiply(slab.at(i, begin), g.weight + (n * depth + begin) * kBlockSize, steps, blocks <= kAsking && i == 0);
      if (extra > 0 && c + 1 == chunks) {
        const bf16* a2 = g.a2.data + (first + i) * g.a2.stride * kBlockSize;
        pipeline.multiply(a2, g.extra_weight + n * extra * kBlockSize, extra);
      }
      swap_sums(partial + i * kSums, c == 0 || i + 1 == blocks ? nullptr : partial + (i + 1) * kSums);
      drain.some();
    }
    if (c + 1 == chunks) pipeline.hand_over(first, n, partial, blocks, blocks * (shallow ? depth : steps));
  };
  if (shallow) {
    for (int64_t n = panels.begin; n < panels.end; ++n)
      for (int64_t c = 0; c < chunks; ++c) sweep(c, n);
  } else {
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t n = panels.begin; n < panels.end; ++n) sweep(c, n);
  }
}

// Row blocks of a slab: what fits, in parts as equal as can be. A W that stays in the cache is read again at no cost, and
// then it is C, and what is added to it, that must not leave before all columns are through.
int64_t slab_blocks(const Gemm& g, int64_t mine) {
  int64_t bytes = g.depth <= kShallow ? kBlock * g.depth * 2 + kSums * 4 : kBlock * g.columns * 4;
  if (g.depth <= kShallow && g.columns * g.depth * 2 <= kLight) bytes += kBlock * g.columns * 4;
  const int64_t most = kSlab / bytes < 1 ? 1 : kSlab / bytes;
  return ceil_div(mine, ceil_div(mine, most));
}

// Whether panels are dealt out to threads instead of rows. Rows are then prepared by every thread, with equal results.
bool deals_panels(const Gemm& g) { return ceil_div(g.rows, kBlock) <= kFew; }

bool run(const Gemm& whole, int64_t index, int64_t threads) {
  Gemm g = whole;
  const bool few = deals_panels(g);
  const Range mine = few ? Range{0, ceil_div(g.rows, kBlock)} : part_of(ceil_div(g.rows, kBlock), threads, index);
  const Range panels = few ? part_of(g.columns / kBlock, threads, index) : Range{0, g.columns / kBlock};
  if (mine.begin == mine.end || panels.begin == panels.end) return true;
  const int64_t blocks = few ? mine.end : slab_blocks(g, mine.end - mine.begin);
  const bool in_place = g.a.layout == kBlocked && g.prologue == kCopy;
  const bool shallow = few || g.depth <= kShallow;
  auto* copy = in_place ? nullptr : static_cast<bf16*>(scratch<SlabTag>(blocks * kBlock * g.depth * 2));
  const int64_t partial = shallow ? 2 * blocks : blocks * (g.columns / kBlock);
  bf16* staged = nullptr;
  if (whole.c.layout != kBlocked) {
    staged = static_cast<bf16*>(scratch<StagedTag>(2 * blocks * kBlock * g.columns * 2));
    if (staged == nullptr) return false;
    g.c = {nullptr, g.columns / kBlock, kBlocked, 0};
    if (g.epilogue == kResidual) g.epilogue = kStore;
  }
  auto* sums = static_cast<float*>(scratch<SumsTag>(partial * kSums * 4));
  if (sums == nullptr || (copy == nullptr && !in_place)) return false;
  const Tiles tiles;
  Pipeline pipeline(g, choose_finish(g));
  Drain drain(whole, staged, blocks, panels);
  for (int64_t first = mine.begin; first < mine.end; first += blocks) {
    const int64_t count = smaller(blocks, mine.end - first);
    Slab slab = {g.a.data + first * g.a.stride * kBlockSize, g.a.stride};
    if (!in_place) {
      slab = {copy, g.depth / kBlock};
      for (int64_t i = 0; i < count; ++i) load_rows(g, first + i, copy + i * kBlock * g.depth);
    }
    if (staged != nullptr) g.c.data = drain.turn(first);
    if (g.down_weight != nullptr) project_down(g, slab, first, count);
    multiply_slab(g, slab, first, count, panels, few, pipeline, drain, sums);
    pipeline.flush();
    if (staged != nullptr) drain.start(first, count, products(g, blocks, panels, few));
  }
  drain.finish();
  return true;
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(gemm)(const fastpeft::Gemm* gemm) {
  using namespace fastpeft;
  const int64_t parts = deals_panels(*gemm) ? gemm->columns / kBlock : ceil_div(gemm->rows, kBlock);
  const int threads = team(gemm->threads, parts);
  bool enough = true;
  parallel(threads, [&](int index) {
    if (!run(*gemm, index, threads)) __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
  });
  return enough ? kOk : kNoMemory;
}
