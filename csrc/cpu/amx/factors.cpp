// Gradients of a narrow factor: out = left^T right, left (rows x 32 n), right (rows x columns), out in fp32. A part of the
// rows, read from end to end, is a thread's.

#include "outer.h"

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

struct OuterTag;

// The sums of some columns, few enough to stay near, over some blocks of rows.
void run(const Factors& f, Range columns, Range row_blocks, int64_t group, Outer& outer) {
  const Rows left = {f.left, f.rows, nullptr}, right = {f.right, f.rows, f.statistics};
  __m512i rows[kBlock];
  for (int64_t first = row_blocks.begin; first < row_blocks.end; first += group) {
    const int64_t steps = smaller(group, row_blocks.end - first);
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t i = first + k;
      for (int64_t w = 0; w < f.width / kBlock; ++w) {
        left.load(i, w, rows);
        outer.put_left(k, w, rows);
      }
      for (int64_t n = columns.begin; n < columns.end; ++n) {
        if (i + 1 < row_blocks.end) right.prefetch(i + 1, n);
        right.load(i, n, rows);
        outer.put_right(k, n - columns.begin, rows);
      }
    }
    outer.add(steps);
  }
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(factors)(const fastpeft::Factors* factors) {
  using namespace fastpeft;
  const Factors& f = *factors;
  const int64_t wide = f.width / kBlock, columns = f.columns / kBlock, depth = ceil_div(f.rows, kBlock);
  const int64_t fit = kSumBytes / (wide * kSums * 4), most = fit < 1 ? 1 : fit;
  const int64_t panels = ceil_div(columns, most), widest = ceil_div(columns, panels);
  const int64_t near = kGroupBytes / (widest * kBlockSize * 2), group = near < 1 ? 1 : near;
  const int threads = team(f.threads, f.parts);
  bool enough = true;
  parallel(threads, [&](int thread) {
    void* memory = scratch<OuterTag>(Outer::bytes(wide, widest, group));
    if (memory == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Tiles tiles;
    // Sums belong to a part, not to a thread: there may be fewer threads than were asked for.
    for (int64_t part = thread; part < f.parts; part += threads)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Range mine = part_of(columns, panels, panel);
        Outer outer(wide, mine.end - mine.begin, group);
        outer.begin(memory);
        run(f, mine, part_of(depth, f.parts, part), group, outer);
        outer.write(f.out + part * f.width * f.columns + mine.begin * kBlock, f.columns);
      }
  });
  return enough ? kOk : kNoMemory;
}
