// A bottleneck adapter, whose numbers are read once:
//
//   h = act(a W_down^T + b_down),   y = a + other + h W_up^T + b_up
//   dz = (dy W_up) * act',   da = dy + dz W_down,   dW_down = dz^T a,   dW_up^T = h^T dy
//
// A thread goes through blocks of 32 rows from end to end. Both products of a block follow on each other while it is in the
// first two caches, with the weights and the sums of the gradients; that is why neither may be larger than those.

#include "outer.h"

namespace fastpeft {

struct BottleneckForward {
  int64_t rows, width, hidden;  // width and hidden are multiples of 32
  Matrix a;                     // blocked
  Matrix other, y;              // `other` may be missing
  Matrix h;                     // blocked, written
  void* slopes;                 // blocked bf16, written; or null
  const bf16 *down, *up;        // packed, hidden x width and width x hidden
  const float *down_bias, *up_bias;  // or null
  int32_t activation, threads;
};

struct BottleneckBackward {
  int64_t rows, width, hidden;
  Matrix dy, a, h;          // h is blocked
  const float* statistics;  // of a's rows, which are then normalised; or null
  void* slopes;             // blocked bf16
  const bf16 *up, *down;    // packed, hidden x width and width x hidden
  Matrix dz;                // blocked, written
  Matrix da;                // blocked, written; or missing
  float *down_sums, *up_sums;  // parts x hidden x width, sums over a part of the rows each; or null
  int64_t parts;
  int32_t threads;
};

namespace {

constexpr int64_t kGroup = 4;  // blocks of rows whose products with the gradients' other side are one go

struct RowTag;
struct DownTag;
struct UpTag;

// C = epilogue(A W^T) for a block of rows, its blocks of A one after another; the sums of a panel are finished while the
// next panel is multiplied.
FASTPEFT_INLINE void product(const Gemm& g, Finish finish, const bf16* a, int64_t row_block, float* sums) {
  const int64_t depth = g.depth / kBlock, columns = g.columns / kBlock;
  for (int64_t n = 0; n < columns; ++n) {
    zero_sums();
    for (int64_t k = 0; k < depth; ++k) multiply_step(a + k * kBlockSize, g.weight + (n * depth + k) * kBlockSize);
    store_sums(sums + (n & 1) * kSums);
    if (n > 0) finish({&g, sums + (~n & 1) * kSums, row_block, n - 1}, 0, kBlock);
  }
  finish({&g, sums + (~columns & 1) * kSums, row_block, columns - 1}, 0, kBlock);
}

const bf16* blocks_of(const Matrix& m, int64_t row_block) { return m.data + row_block * m.stride * kBlockSize; }

Gemm gemm_of(int64_t rows, int64_t columns, int64_t depth, const bf16* weight, const float* bias, Matrix c,
             Epilogue epilogue) {
  Gemm g = {};
  g.rows = rows;
  g.columns = columns;
  g.depth = depth;
  g.weight = weight;
  g.bias = bias;
  g.c = c;
  g.epilogue = epilogue;
  return g;
}

void forward(const BottleneckForward& f, Range mine) {
  alignas(64) float sums[2 * kSums];
  Gemm down = gemm_of(f.rows, f.hidden, f.width, f.down, f.down_bias, f.h, kActivate);
  down.activation = f.activation;
  down.keep = f.slopes == nullptr ? kNothing : kSlope16;
  down.kept = f.slopes;
  Gemm up = gemm_of(f.rows, f.width, f.hidden, f.up, f.up_bias, f.y, kResidual);
  up.other = f.a;
  up.another = f.other;
  const Finish finish_down = choose_finish(down), finish_up = choose_finish(up);
  const Rows a = {f.a, f.rows, nullptr}, other = {f.other, f.rows, nullptr};
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    if (i + 1 < mine.end)
      for (int64_t n = 0; n < f.width / kBlock; ++n) {
        a.prefetch(i + 1, n);
        if (f.other.data != nullptr) other.prefetch(i + 1, n);
      }
    product(down, finish_down, blocks_of(f.a, i), i, sums);
    product(up, finish_up, blocks_of(f.h, i), i, sums);
  }
}

void backward(const BottleneckBackward& b, Range mine, bf16* row, Outer* down_outer, Outer* up_outer) {
  alignas(64) float sums[2 * kSums];
  const int64_t width = b.width / kBlock, hidden = b.hidden / kBlock;
  Gemm up = gemm_of(b.rows, b.hidden, b.width, b.up, nullptr, b.dz, kScale);
  up.keep = kSlope16;
  up.kept = b.slopes;
  Gemm down = gemm_of(b.rows, b.width, b.hidden, b.down, nullptr, b.da, kResidual);
  down.other = b.dy;
  const Finish finish_up = choose_finish(up), finish_down = choose_finish(down);
  const Rows dy = {b.dy, b.rows, nullptr}, a = {b.a, b.rows, b.statistics}, h = {b.h, b.rows, nullptr},
             dz = {b.dz, b.rows, nullptr};
  __m512i rows[kBlock];
  for (int64_t first = mine.begin; first < mine.end; first += kGroup) {
    const int64_t steps = smaller(kGroup, mine.end - first);
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t i = first + k;
      const bool more = i + 1 < mine.end;
      for (int64_t n = 0; n < width; ++n) {
        if (more) dy.prefetch(i + 1, n);
        dy.load(i, n, rows);
        put_left(rows, row + n * kBlockSize);
        if (up_outer != nullptr) up_outer->put_right(k, n, rows);
      }
      product(up, finish_up, row, i, sums);
      if (b.da.data != nullptr) product(down, finish_down, blocks_of(b.dz, i), i, sums);
      if (up_outer != nullptr)
        for (int64_t w = 0; w < hidden; ++w) {
          h.load(i, w, rows);
          up_outer->put_left(k, w, rows);
        }
      if (down_outer == nullptr) continue;
      for (int64_t w = 0; w < hidden; ++w) {
        dz.load(i, w, rows);
        down_outer->put_left(k, w, rows);
      }
      for (int64_t n = 0; n < width; ++n) {
        if (more) a.prefetch(i + 1, n);
        a.load(i, n, rows);
        down_outer->put_right(k, n, rows);
      }
    }
    if (up_outer != nullptr) up_outer->add(steps);
    if (down_outer != nullptr) down_outer->add(steps);
  }
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(bottleneck_forward)(const fastpeft::BottleneckForward* forward) {
  using namespace fastpeft;
  const BottleneckForward& f = *forward;
  const int64_t depth = ceil_div(f.rows, kBlock);
  const int threads = team(f.threads, depth);
  parallel(threads, [&](int thread) {
    const Tiles tiles;
    fastpeft::forward(f, part_of(depth, threads, thread));
  });
  return kOk;
}

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(bottleneck_backward)(const fastpeft::BottleneckBackward* backward) {
  using namespace fastpeft;
  const BottleneckBackward& b = *backward;
  const int64_t width = b.width / kBlock, hidden = b.hidden / kBlock, depth = ceil_div(b.rows, kBlock);
  const int threads = team(b.threads, b.parts);
  const int64_t bytes = Outer::bytes(hidden, width, kGroup);
  bool enough = true;
  parallel(threads, [&](int thread) {
    auto* row = static_cast<bf16*>(scratch<RowTag>(kBlock * b.width * 2));
    void* down = b.down_sums == nullptr ? nullptr : scratch<DownTag>(bytes);
    void* up = b.up_sums == nullptr ? nullptr : scratch<UpTag>(bytes);
    if (row == nullptr || (b.down_sums != nullptr && down == nullptr) || (b.up_sums != nullptr && up == nullptr)) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Tiles tiles;
    // Sums belong to a part, not to a thread: there may be fewer threads than were asked for.
    for (int64_t part = thread; part < b.parts; part += threads) {
      Outer down_outer(hidden, width, kGroup), up_outer(hidden, width, kGroup);
      if (down != nullptr) down_outer.begin(down);
      if (up != nullptr) up_outer.begin(up);
      fastpeft::backward(b, part_of(depth, b.parts, part), row, down == nullptr ? nullptr : &down_outer,
                         up == nullptr ? nullptr : &up_outer);
      if (down != nullptr) down_outer.write(b.down_sums + part * b.hidden * b.width, b.width);
      if (up != nullptr) up_outer.write(b.up_sums + part * b.hidden * b.width, b.width);
    }
  });
  return enough ? kOk : kNoMemory;
}
