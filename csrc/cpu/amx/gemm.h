// C = epilogue(A W^T + A2 W2^T) for a frozen W, packed once. A2 may come along: A2 = act(A W3^T).
//
// What a caller hands over is `Gemm`, as fastpeft/native/gemm.py lays it out. All matrices are bf16, sums are fp32.

#pragma once

#include "../common.h"

namespace fastpeft {

// A matrix of activations. Row-major: row r begins at data + r * stride. Blocked: blocks of 32 x 32 numbers, 2 KiB in a
// piece, those of the same rows one after another: number (r, c) is at ((r / 32) * stride + c / 32) * 1024 + (r % 32) * 32
// + c % 32, with stride the count of blocks in a row of blocks. What a product writes blocked, the next reads as it is.
// Wide: row-major in fp32, as the residual stream is where weights are bf16 for the products alone.
enum Layout : int32_t { kRowMajor = 0, kBlocked = 1, kWide = 2 };

struct Matrix {
  bf16* data;  // floats in a wide matrix
  int64_t stride;
  int32_t layout;
  int32_t unused;
};

// What becomes of A's rows on their way to the matrix unit.
enum Prologue : int32_t {
  kCopy = 0,       // nothing
  kNormalise = 1,  // (a - mean) * rstd, both written to `statistics`
};

// What becomes of a sum s on its way to C.
enum Epilogue : int32_t {
  kStore = 0,     // s + bias
  kResidual = 1,  // s + bias + other + another
  kActivate = 2,  // act(s + bias)
  kScale = 3,     // s * kept
};

// What kActivate leaves in `kept` for the backward pass, and kScale reads there.
enum Kept : int32_t { kNothing = 0, kSlope16 = 1, kSlope8 = 2 };

struct Gemm {
  int64_t rows, columns, depth;  // columns and depth are multiples of 32
  int64_t extra;                 // depth of A2 W2^T, a multiple of 32 or 0
  Matrix a, c, other, another;   // `another` may be missing
  const bf16* weight;       // packed, see pack.cpp
  const bf16* extra_weight;  // packed, columns x extra
  const bf16* down_weight;   // packed, down x depth: A2 = act(A down_weight^T + down_bias); or null, and A2 is read
  const float* down_bias;
  void* down_slopes;         // blocked bf16, written: the derivatives of that activation; or null
  int64_t down;              // columns of A2 if down_weight is given
  Matrix a2;                 // blocked; written if down_weight is given
  const float* bias;         // columns, or null
  float* statistics;         // 2 x rows: means, then reciprocal deviations
  void* kept;                // blocked, 2 or 1 bytes a number
  float epsilon;
  int32_t prologue, epilogue, activation, keep, down_activation, threads;
};

}  // namespace fastpeft
