// A bottleneck adapter in one pass over its input, forward and backward:
//
//   z = x down^T + down_bias,   h = act(z),        y  = scale * (h up^T + up_bias) + residual
//   dh = scale * dy up,         dz = dh * act'(z), dx = dz down + add
//
// A block of four warps has 64 rows, 16 a warp. First the wide dimension passes by in slices and is summed into the few
// hidden columns, which stay in registers: the first product's result is the second one's left factor (mma.cuh). Then
// the wide dimension passes by again, as columns of the result. One double buffer serves both halves, and the second
// half's first slice arrives while the first half's last one is multiplied.

#include "activation.cuh"
#include "kernels.h"
#include "mma.cuh"

namespace fastpeft {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;
constexpr int kColumns = 64;  // of the result, at once

// Blocks a multiprocessor should hold: mostly they wait for memory.
template <int R>
constexpr int kBlocks = R <= 32 ? 4 : R <= 64 ? 3 : 2;

constexpr int larger(int a, int b) { return a > b ? a : b; }

// `count` rows from `first` on, and columns from `column` on, of a matrix.
struct MatrixRows {
  const uint16_t* data;
  int64_t stride, first, count;
  int column;

  FASTPEFT_DEVICE Row operator()(int r) const {
    return {const_cast<uint16_t*>(data) + (first + r) * stride + column, first + r < count};
  }
};

// Rounds this warp's result, plus what the tile holds where `add`, into the tile: scale (c + bias) + tile. `tile` is its
// first row; `bias` is that of its first column, or null, `width` columns are there.
template <class T>
FASTPEFT_DEVICE void finish(Shared tile, const float (&c)[1][kColumns / 8][4], float scale, const uint16_t* bias,
                            bool add, int width) {
  const int column = lane_index() % 4 * 2;
  const Shared address = tile + (lane_index() / 4) * kPitch<kColumns> + 2 * column;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    Float2 more = {0.0f, 0.0f};
    if (bias != nullptr && 8 * n + column < width) more = unpack<T>(global_load<uint32_t>(bias + 8 * n + column));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Shared at = address + half * 8 * kPitch<kColumns> + 16 * n;
      Float2 rest = {0.0f, 0.0f};
      if (add) rest = unpack<T>(shared_load_word(at));
      shared_store(at, pack<T>(scale * (c[0][n][2 * half] + more.x) + rest.x,
                               scale * (c[0][n][2 * half + 1] + more.y) + rest.y));
    }
  }
}

// Adds the bias of the hidden columns. Those from `hidden` on are zero: their weights are.
template <class T, int R>
FASTPEFT_DEVICE void add_bias(float (&z)[1][R / 8][4], const uint16_t* bias, int hidden) {
  if (bias == nullptr) return;
  const int column = lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < R / 8; ++n) {
    if (8 * n + column >= hidden) continue;
    const Float2 more = unpack<T>(global_load<uint32_t>(bias + 8 * n + column));
    z[0][n][0] += more.x, z[0][n][1] += more.y, z[0][n][2] += more.x, z[0][n][3] += more.y;
  }
}

// ---- Forward ----

template <int R>
struct ForwardTiling {
  static constexpr int kSlice = 64;
  static constexpr int kDownBytes = kTileBytes<kRows + R, kSlice>;
  static constexpr int kUpBytes = kTileBytes<kColumns, R> + kTileBytes<kRows, kColumns>;
  static constexpr int kBufferBytes = larger(kDownBytes, kUpBytes);
  static constexpr int kSharedBytes = 2 * kBufferBytes;
};

struct ForwardParams {
  Adapter a;
  AdapterForward f;
};

template <class T, int R>
FASTPEFT_KERNEL(kThreads, kBlocks<R>)
forward_kernel(const ForwardParams p) {
  using Tiling = ForwardTiling<R>;
  constexpr int kSlice = Tiling::kSlice;
  const Adapter& a = p.a;
  const int64_t first = block_index() * kRows;
  const int slices = (a.width + kSlice - 1) / kSlice;
  const int steps = slices + (a.width + kColumns - 1) / kColumns;
  const bool residual = p.f.residual != nullptr;

  const auto buffer = [&](int i) { return shared_memory() + (i % 2) * Tiling::kBufferBytes; };
  // Step i < slices: x, then down. After those: up, then the residual.
  const auto start_step = [&](int i) {
    if (i < slices) {
      const int column = i * kSlice, width = a.width - column;
      copy_tile<kRows, kSlice, kThreads>(buffer(i), MatrixRows{a.x, a.x_stride, first, a.rows, column}, width);
      copy_tile<R, kSlice, kThreads>(buffer(i) + kTileBytes<kRows, kSlice>,
                                     MatrixRows{a.down, a.width, 0, a.hidden, column}, width);
    } else {
      const int column = (i - slices) * kColumns, width = a.width - column;
      copy_tile<kColumns, R, kThreads>(buffer(i), MatrixRows{a.up, a.hidden, column, a.width, 0}, a.hidden);
      if (residual) {
        copy_tile<kRows, kColumns, kThreads>(buffer(i) + kTileBytes<kColumns, R>,
                                             MatrixRows{p.f.residual, p.f.residual_stride, first, a.rows, column}, width);
      }
    }
    copy_commit();
  };

  float z[1][R / 8][4];
  clear(z);
  const int warp_first = 16 * warp_index();
  start_step(0);
  for (int i = 0; i < slices; ++i) {
    copy_wait<0>();
    block_sync();  // the slice is there for all, and nobody reads the one before it any more
    start_step(i + 1);
    multiply_transposed<T, kSlice, 1, R / 16>(
        z, lane_of_rows<kSlice>(buffer(i) + warp_first * kPitch<kSlice>),
        lane_of_columns<kSlice>(buffer(i) + kTileBytes<kRows, kSlice>));
  }
  add_bias<T, R>(z, a.down_bias, a.hidden);
  activate(z, a.activation);
  uint32_t h[R / 16][1][4];
#pragma unroll
  for (int k = 0; k < R / 16; ++k) pack_left<T>(h[k][0], z[0][2 * k], z[0][2 * k + 1]);

  for (int i = slices; i < steps; ++i) {
    copy_wait<0>();
    block_sync();
    if (i + 1 < steps) start_step(i + 1);
    const int column = (i - slices) * kColumns, width = a.width - column;
    float y[1][kColumns / 8][4];
    clear(y);
    multiply_transposed<T, R, 1, kColumns / 16>(y, h, lane_of_columns<R>(buffer(i)));
    const Shared tile = buffer(i) + kTileBytes<kColumns, R> + warp_first * kPitch<kColumns>;
    finish<T>(tile, y, a.scale, p.f.up_bias == nullptr ? nullptr : p.f.up_bias + column, residual, width);
    warp_sync();
    tile_to_global<16, kColumns>(tile, MatrixRows{p.f.y, a.width, first + warp_first, a.rows, column}, width);
  }
}

// ---- Backward ----

template <int R>
struct BackwardTiling {
  static constexpr int kSlice = R <= 64 ? 64 : 32;
  // x, dy, down, up
  static constexpr int kDownBytes = kTileBytes<2 * kRows + R, kSlice> + kTileBytes<kSlice, R>;
  // down, add
  static constexpr int kUpBytes = kTileBytes<R + kRows, kColumns>;
  static constexpr int kBufferBytes = larger(kDownBytes, kUpBytes);
  static constexpr int kSharedBytes = 2 * kBufferBytes;
};

struct BackwardParams {
  Adapter a;
  AdapterBackward b;
};

// Writes this warp's rows of a (rows, hidden) result.
template <class T, int R>
FASTPEFT_DEVICE void store_hidden(uint16_t* to, const float (&c)[1][R / 8][4], int64_t first, int64_t rows, int hidden) {
  if (to == nullptr) return;
  const int column = lane_index() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + 8 * half + lane_index() / 4;
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < R / 8; ++n) {
      if (8 * n + column >= hidden) continue;
      global_store(to + row * hidden + 8 * n + column, pack<T>(c[0][n][2 * half], c[0][n][2 * half + 1]));
    }
  }
}

template <class T, int R>
FASTPEFT_KERNEL(kThreads, kBlocks<R>)
backward_kernel(const BackwardParams p) {
  using Tiling = BackwardTiling<R>;
  constexpr int kSlice = Tiling::kSlice;
  const Adapter& a = p.a;
  const int64_t first = block_index() * kRows;
  const int slices = (a.width + kSlice - 1) / kSlice;
  const int steps = slices + (p.b.dx == nullptr ? 0 : (a.width + kColumns - 1) / kColumns);
  const bool add = p.b.add != nullptr;

  const auto buffer = [&](int i) { return shared_memory() + (i % 2) * Tiling::kBufferBytes; };
  // Step i < slices: x, dy, down, up. After those: down, then what is added.
  const auto start_step = [&](int i) {
    if (i < slices) {
      const int column = i * kSlice, width = a.width - column;
      Shared tile = buffer(i);
      copy_tile<kRows, kSlice, kThreads>(tile, MatrixRows{a.x, a.x_stride, first, a.rows, column}, width);
      tile += kTileBytes<kRows, kSlice>;
      copy_tile<kRows, kSlice, kThreads>(tile, MatrixRows{p.b.dy, p.b.dy_stride, first, a.rows, column}, width);
      tile += kTileBytes<kRows, kSlice>;
      copy_tile<R, kSlice, kThreads>(tile, MatrixRows{a.down, a.width, 0, a.hidden, column}, width);
      tile += kTileBytes<R, kSlice>;
      copy_tile<kSlice, R, kThreads>(tile, MatrixRows{a.up, a.hidden, column, a.width, 0}, a.hidden);
    } else {
      const int column = (i - slices) * kColumns, width = a.width - column;
      copy_tile<R, kColumns, kThreads>(buffer(i), MatrixRows{a.down, a.width, 0, a.hidden, column}, width);
      if (add) {
        copy_tile<kRows, kColumns, kThreads>(buffer(i) + kTileBytes<R, kColumns>,
                                             MatrixRows{p.b.add, p.b.add_stride, first, a.rows, column}, width);
      }
    }
    copy_commit();
  };

  float z[1][R / 8][4], dh[1][R / 8][4];
  clear(z);
  clear(dh);
  const int warp_first = 16 * warp_index();
  start_step(0);
  for (int i = 0; i < slices; ++i) {
    copy_wait<0>();
    block_sync();  // the slice is there for all, and nobody reads the one before it any more
    if (i + 1 < steps) start_step(i + 1);
    const Shared x = buffer(i), dy = x + kTileBytes<kRows, kSlice>, down = dy + kTileBytes<kRows, kSlice>;
    const Shared up = lane_of_rows<R>(down + kTileBytes<R, kSlice>);
    multiply_transposed<T, kSlice, 1, R / 16>(z, lane_of_rows<kSlice>(x + warp_first * kPitch<kSlice>),
                                              lane_of_columns<kSlice>(down));
    const Shared own = lane_of_rows<kSlice>(dy + warp_first * kPitch<kSlice>);
#pragma unroll 2
    for (int k = 0; k < kSlice / 16; ++k) {
      uint32_t left[1][4];
      load_matrices(left[0], own + k * 32);
      multiply_block<T, R, kPitch<R>>(dh, left, up + k * 16 * kPitch<R>);
    }
  }
  add_bias<T, R>(z, a.down_bias, a.hidden);
#pragma unroll
  for (int n = 0; n < R / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dh[0][n][e] *= a.scale;
  }
  differentiate(z, dh, a.activation);  // z becomes h, dh becomes dz
  store_hidden<T, R>(p.b.h, z, first + warp_first, a.rows, a.hidden);
  store_hidden<T, R>(p.b.dz, dh, first + warp_first, a.rows, a.hidden);
  uint32_t dz[R / 16][1][4];
#pragma unroll
  for (int k = 0; k < R / 16; ++k) pack_left<T>(dz[k][0], dh[0][2 * k], dh[0][2 * k + 1]);

  for (int i = slices; i < steps; ++i) {
    copy_wait<0>();
    block_sync();
    if (i + 1 < steps) start_step(i + 1);
    const int column = (i - slices) * kColumns, width = a.width - column;
    float dx[1][kColumns / 8][4];
    clear(dx);
#pragma unroll
    for (int k = 0; k < R / 16; ++k) {
      multiply_block<T, kColumns, kPitch<kColumns>>(dx, dz[k], lane_of_rows<kColumns>(buffer(i)) + k * 16 * kPitch<kColumns>);
    }
    const Shared tile = buffer(i) + kTileBytes<R, kColumns> + warp_first * kPitch<kColumns>;
    finish<T>(tile, dx, 1.0f, nullptr, add, width);
    warp_sync();
    tile_to_global<16, kColumns>(tile, MatrixRows{p.b.dx, a.width, first + warp_first, a.rows, column}, width);
  }
}

int64_t blocks_of(const Adapter& a) { return (a.rows + kRows - 1) / kRows; }

// The hidden columns are padded with zeros in shared memory to 16, 32, 64, 96 or 128.
template <class T>
void choose(const Adapter& a, const ForwardParams& p, void* stream) {
  const auto start = [&](auto kernel, int bytes) { launch(kernel, blocks_of(a), kThreads, bytes, stream, p); };
  if (a.hidden <= 16) return start(forward_kernel<T, 16>, ForwardTiling<16>::kSharedBytes);
  if (a.hidden <= 32) return start(forward_kernel<T, 32>, ForwardTiling<32>::kSharedBytes);
  if (a.hidden <= 64) return start(forward_kernel<T, 64>, ForwardTiling<64>::kSharedBytes);
  if (a.hidden <= 96) return start(forward_kernel<T, 96>, ForwardTiling<96>::kSharedBytes);
  return start(forward_kernel<T, 128>, ForwardTiling<128>::kSharedBytes);
}

template <class T>
void choose(const Adapter& a, const BackwardParams& p, void* stream) {
  const auto start = [&](auto kernel, int bytes) { launch(kernel, blocks_of(a), kThreads, bytes, stream, p); };
  if (a.hidden <= 16) return start(backward_kernel<T, 16>, BackwardTiling<16>::kSharedBytes);
  if (a.hidden <= 32) return start(backward_kernel<T, 32>, BackwardTiling<32>::kSharedBytes);
  if (a.hidden <= 64) return start(backward_kernel<T, 64>, BackwardTiling<64>::kSharedBytes);
  if (a.hidden <= 96) return start(backward_kernel<T, 96>, BackwardTiling<96>::kSharedBytes);
  return start(backward_kernel<T, 128>, BackwardTiling<128>::kSharedBytes);
}

template <class Params>
void choose_element(const Adapter& a, const Params& p, void* stream) {
  a.element == Element::kBf16 ? choose<Bf16>(a, p, stream) : choose<Fp16>(a, p, stream);
}

}  // namespace

void adapter_forward(const Adapter& a, const AdapterForward& f, void* stream) {
  choose_element(a, ForwardParams{a, f}, stream);
}

void adapter_backward(const Adapter& a, const AdapterBackward& b, void* stream) {
  choose_element(a, BackwardParams{a, b}, stream);
}

}  // namespace fastpeft
