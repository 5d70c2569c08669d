// The matrix unit: eight tiles of 16 rows of 64 bytes, and the product that everything here is made of.
//
// The micro-kernel multiplies 32 rows by 32 columns, 32 numbers of depth a step: four accumulator tiles of fp32, two
// tiles of A, two of B. Both operands are read as blocks of 2 KiB:
//
//   A: 32 rows of 32 bf16, row after row ("a block");
//   B: for each 16 of the 32 columns, 16 rows of 16 pairs (k, k + 1), as the instruction wants its right factor.
//
// A step is 64 cycles of the matrix unit and 4 KiB of operands.

#pragma once

#include <immintrin.h>

#include "../common.h"

namespace fastpeft {

constexpr int64_t kBlock = 32;                 // rows and columns of a block
constexpr int64_t kBlockSize = kBlock * kBlock;  // numbers in it

// Shapes of the eight tiles; a thread loads them before its products and releases them behind, since a thread that
// holds tiles is slower to switch from.
struct __attribute__((packed)) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant in memory: gcc believes that the instruction reads eight bytes of it and drops what it can of a local one.
alignas(64) static const TileShapes kTileShapes;

// Meanwhile numbers below 1e-38 count as zero, as they do for the matrix unit: an exponential's tail would cost hundreds
// of cycles a number.
class Tiles {
 public:
  Tiles() : control_(_mm_getcsr()) {
    _tile_loadconfig(&kTileShapes);
    _mm_setcsr(control_ | 0x8040);
  }
  ~Tiles() {
    _mm_setcsr(control_);
    _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  unsigned control_;
};

// Accumulators of a 32 x 32 product, as they lie in memory: four tiles of 16 x 16, top left, top right, bottom ....
constexpr int64_t kSums = kBlockSize;

FASTPEFT_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

FASTPEFT_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  _tile_loadd(2, sums + 512, 64);
  _tile_loadd(3, sums + 768, 64);
}

FASTPEFT_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// Stores the sums of one product and loads those of the next (null: zeros) tile by tile, so that the matrix unit can begin
// with the next product's first tile while the last ones are on their way out.
FASTPEFT_INLINE void swap_sums(float* sums, const float* next) {
  if (next == nullptr) {
    store_sums(sums);
    zero_sums();
    return;
  }
  _tile_stored(0, sums, 64);
  _tile_loadd(0, next, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_loadd(1, next + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_loadd(2, next + 512, 64);
  _tile_stored(3, sums + 768, 64);
  _tile_loadd(3, next + 768, 64);
}

// One step. `a_stride` is the distance of A's rows in bytes, 64 within a block.
FASTPEFT_INLINE void multiply_step(const bf16* a, const bf16* b, int64_t a_stride = 64) {
  _tile_loadd(6, b, 64);
  _tile_loadd(4, a, a_stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + 512, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, reinterpret_cast<const char*>(a) + 16 * a_stride, a_stride);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

}  // namespace fastpeft
