// Softmax over keys that come in tiles, in fp32.
//
//   m <- max(m, max_j s_j),   l <- l f + sum_j p_j,   p_j = exp(scale (s_j - m)),   f = exp(scale (m_before - m))
//
// The exponentials are powers of two, with scale log2(e) in place of scale. Thread l of a warp holds the rows g and g + 8
// of every 16 x 8 block of scores (mma.cuh), 2 columns of each; the four threads of a row exchange only its maximum, and
// at the very end its sum.

#pragma once

#include "mma.cuh"

namespace fastpeft {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kHidden = -__builtin_huge_valf();

// Scores of a key that no query may see become this; a row that has seen no key at all keeps it as its maximum.
template <int M>
struct Softmax {
  float largest[M][2];
  float sum[M][2];

  FASTPEFT_DEVICE Softmax() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      largest[m][0] = largest[m][1] = kHidden;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // Turns scores into exp2(factor (s - m)) and rescales what was summed with the maximum before.
  template <int N, int D>
  FASTPEFT_DEVICE void update(float (&s)[M][N][4], float (&sums)[M][D][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = largest[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        const float base = top == kHidden ? 0.0f : top * factor;
        const float rescale = exp2_fast(largest[m][half] * factor - base);
        largest[m][half] = top;
        float total = sum[m][half] * rescale;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          s[m][n][2 * half] = exp2_fast(s[m][n][2 * half] * factor - base);
          s[m][n][2 * half + 1] = exp2_fast(s[m][n][2 * half + 1] * factor - base);
          total += s[m][n][2 * half] + s[m][n][2 * half + 1];
        }
        sum[m][half] = total;
#pragma unroll
        for (int d = 0; d < D; ++d) {
          sums[m][d][2 * half] *= rescale;
          sums[m][d][2 * half + 1] *= rescale;
        }
      }
    }
  }

  // Sums of whole rows, in all four threads of a row.
  FASTPEFT_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += shuffle_xor(sum[m][half], 1);
        sum[m][half] += shuffle_xor(sum[m][half], 2);
      }
    }
  }
};

}  // namespace fastpeft
