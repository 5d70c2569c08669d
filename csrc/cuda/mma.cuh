// Tiles in shared memory and products of tiles on the tensor cores.
//
// One warp multiplies with `mma.sync.m16n8k16`: c (16 x 8, fp32) += a (16 x 16) b (16 x 8). Thread l of the warp, with
// g = l / 4 and t = l % 4, holds (r0, r1 are the two halves of a 32-bit register, the lower first)
//
//   a[0]: rows g,     columns 2t, 2t + 1          c[0], c[1]: row g,     columns 2t, 2t + 1
//   a[1]: rows g + 8, columns 2t, 2t + 1          c[2], c[3]: row g + 8, columns 2t, 2t + 1
//   a[2]: rows g,     columns 2t + 8, 2t + 9
//   a[3]: rows g + 8, columns 2t + 8, 2t + 9
//   b0:   rows 2t, 2t + 1,     column g
//   b1:   rows 2t + 8, 2t + 9, column g
//
// So the c of two products side by side (16 x 16), rounded and packed, is the a of a next product, and nothing needs to
// pass through memory: that is how the probabilities of attention become the left factor of P V.
//
// `load_matrices` fills such registers from four 8x8 matrices in shared memory:
//
//   a of 16 rows, 16 columns, and b whose rows (k) lie in memory as rows, transposed on the way:
//     matrix 0 | matrix 2        thread l gives the address of row l % 16, column 8 (l / 16)
//     matrix 1 | matrix 3        -> `lane_of_rows`
//   b whose columns (n) lie in memory as rows, as the keys of Q K^T do, for two products side by side:
//     matrix 0 | matrix 1        thread l gives the address of row l % 8 + 8 (l / 16), column 8 (l / 8 % 2)
//     matrix 2 | matrix 3        -> `lane_of_columns`
//
// A tile of C columns has rows of 2 C + 16 bytes. Counted in pieces of 16 bytes that is an odd number, so that the eight
// rows of a matrix lie in different banks, and every address is one base plus a constant.

#pragma once

#include "primitives.cuh"

namespace fastpeft {

constexpr int kWarp = 32;

FASTPEFT_DEVICE int lane_index() { return thread_index() % kWarp; }
FASTPEFT_DEVICE int warp_index() { return thread_index() / kWarp; }

// Bytes from one row of a tile to the next.
template <int COLUMNS>
constexpr int kPitch = 2 * COLUMNS + 16;

template <int ROWS, int COLUMNS>
constexpr int kTileBytes = ROWS * kPitch<COLUMNS>;

// This thread's address for the left factor, and for a right factor that is transposed on the way.
template <int COLUMNS>
FASTPEFT_DEVICE Shared lane_of_rows(Shared tile) {
  const int lane = lane_index();
  return tile + (lane % 16) * kPitch<COLUMNS> + (lane / 16) * 16;
}

// This thread's address for a right factor that lies in memory column by column.
template <int COLUMNS>
FASTPEFT_DEVICE Shared lane_of_columns(Shared tile) {
  const int lane = lane_index();
  return tile + (lane % 8 + lane / 16 * 8) * kPitch<COLUMNS> + (lane / 8 % 2) * 16;
}

// Where a row is in global memory, if it is there at all.
struct Row {
  uint16_t* address;
  bool valid;
};

// Starts copying a tile of ROWS x COLUMNS elements by all THREADS of the block. `row(r)` is row r, one of zeros if it is
// not valid; columns from `width` on are zeros too. Rows start at multiples of 16 bytes, width is a multiple of 8.
template <int ROWS, int COLUMNS, int THREADS, class Rows>
FASTPEFT_DEVICE void copy_tile(Shared tile, const Rows& row, int width = COLUMNS) {
  constexpr int kPieces = COLUMNS / 8;
  constexpr int kRowsAtOnce = THREADS / kPieces;
  const int piece = thread_index() % kPieces;
  // A thread stays in its column of pieces; the last few have none where kPieces does not divide THREADS.
  if (THREADS % kPieces != 0 && thread_index() >= kRowsAtOnce * kPieces) return;
#pragma unroll
  for (int i = 0; i < (ROWS + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    const int r = thread_index() / kPieces + i * kRowsAtOnce;
    if (ROWS % kRowsAtOnce != 0 && r >= ROWS) return;
    const Row source = row(r);
    copy_async_16(tile + r * kPitch<COLUMNS> + 16 * piece, source.address + 8 * piece,
                  source.valid && 8 * piece < width);
  }
}

// c += a b^T, where a has 16 M rows and b has 16 G rows of K elements, both in shared memory and addressed by
// lane_of_rows and lane_of_columns. Only the first `groups` groups of 16 rows of b are multiplied.
template <class T, int K, int M, int G, bool LIMITED = false>
FASTPEFT_DEVICE void multiply_transposed(float (&c)[M][2 * G][4], Shared a, Shared b, int groups = G) {
// Not further: the assembler would read all of a and b ahead, and run out of registers.
#pragma unroll 2
  for (int k = 0; k < K / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(left[m], a + m * 16 * kPitch<K> + k * 32);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (LIMITED && g >= groups) continue;
      uint32_t right[4];
      load_matrices(right, b + g * 16 * kPitch<K> + k * 32);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(c[m][2 * g], left[m], right[0], right[1]);
        mma<T>(c[m][2 * g + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same with a in registers: left[k][m] is its k-th block of 16 columns.
template <class T, int K, int M, int G, bool LIMITED = false>
FASTPEFT_DEVICE void multiply_transposed(float (&c)[M][2 * G][4], const uint32_t (&left)[K / 16][M][4], Shared b,
                                         int groups = G) {
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (LIMITED && g >= groups) continue;
      uint32_t right[4];
      load_matrices(right, b + g * 16 * kPitch<K> + k * 32);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(c[m][2 * g], left[k][m], right[0], right[1]);
        mma<T>(c[m][2 * g + 1], left[k][m], right[2], right[3]);
      }
    }
  }
}

// c += p b for a block of 16 columns of p, in registers, and the 16 rows of b that it meets: N elements each, in shared
// memory with rows of PITCH bytes, addressed by lane_of_rows.
template <class T, int N, int PITCH, int M>
FASTPEFT_DEVICE void multiply_block(float (&c)[M][N / 8][4], const uint32_t (&p)[M][4], Shared b) {
#pragma unroll
  for (int n = 0; n < N / 16; ++n) {
    uint32_t right[4];
    load_matrices_transposed(right, b + n * 32);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma<T>(c[m][2 * n], p[m], right[0], right[1]);
      mma<T>(c[m][2 * n + 1], p[m], right[2], right[3]);
    }
  }
}

// Results of two products side by side as a left factor.
template <class T>
FASTPEFT_DEVICE void pack_left(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = pack<T>(first[0], first[1]);
  a[1] = pack<T>(first[2], first[3]);
  a[2] = pack<T>(second[0], second[1]);
  a[3] = pack<T>(second[2], second[3]);
}

template <int M, int N>
FASTPEFT_DEVICE void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
}

// Rounds this warp's 16 M rows of COLUMNS results and writes them to its rows of a tile: `tile` is the first of them.
template <class T, int COLUMNS, int M>
FASTPEFT_DEVICE void store_to_tile(Shared tile, const float (&c)[M][COLUMNS / 8][4]) {
  const Shared address = tile + (lane_index() / 4) * kPitch<COLUMNS> + (lane_index() % 4) * 4;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
      shared_store(address + m * 16 * kPitch<COLUMNS> + n * 16, pack<T>(c[m][n][0], c[m][n][1]));
      shared_store(address + (m * 16 + 8) * kPitch<COLUMNS> + n * 16, pack<T>(c[m][n][2], c[m][n][3]));
    }
  }
}

// Copies ROWS rows of a tile to global memory by the threads of one warp; `row(r)` is where row r goes, if it is valid;
// columns from `width` on stay behind.
template <int ROWS, int COLUMNS, class Rows>
FASTPEFT_DEVICE void tile_to_global(Shared tile, const Rows& row, int width = COLUMNS) {
  constexpr int kPieces = COLUMNS / 8;
  constexpr int kTotal = ROWS * kPieces;
#pragma unroll
  for (int i = 0; i < (kTotal + kWarp - 1) / kWarp; ++i) {
    const int index = lane_index() + i * kWarp;
    if (kTotal % kWarp != 0 && index >= kTotal) return;
    const int r = index / kPieces, piece = index % kPieces;
    const Row to = row(r);
    if (to.valid && 8 * piece < width) {
      global_store(to.address + 8 * piece, shared_load_word4(tile + r * kPitch<COLUMNS> + 16 * piece));
    }
  }
}

}  // namespace fastpeft
