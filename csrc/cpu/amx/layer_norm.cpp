// The gradient of a LayerNorm whose weight and bias are folded into the product behind it, and the sum beside it:
//
//   dx = dsum + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)),   xhat = (x - mean) * rstd

#include "matrix.h"

namespace fastpeft {

struct LayerNormBackward {
  int64_t rows, columns;  // columns are a multiple of 32
  Matrix dxhat, x, dsum, dx;  // dsum may be null
  const float* statistics;    // 2 x rows: means, then reciprocal deviations
  int32_t threads;
};

namespace {

void run_row(const LayerNormBackward& c, int64_t row) {
  const int64_t blocks = c.columns / kBlock, block = row / kBlock, r = row % kBlock;
  const float mean = c.statistics[row], rstd = c.statistics[c.rows + row];
  const __m512 s = constant(rstd), shift = constant(-mean * rstd);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, dot[2] = {sum[0], sum[0]};
  for (int64_t n = 0; n < blocks; ++n) {
    const Row g = read(c.dxhat, block, r, n), x = read(c.x, block, r, n);
    sum[0] = _mm512_add_ps(sum[0], g.low);
    sum[1] = _mm512_add_ps(sum[1], g.high);
    dot[0] = _mm512_fmadd_ps(g.low, _mm512_fmadd_ps(x.low, s, shift), dot[0]);
    dot[1] = _mm512_fmadd_ps(g.high, _mm512_fmadd_ps(x.high, s, shift), dot[1]);
  }
  const float mean_g = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / c.columns;
  const float mean_gx = _mm512_reduce_add_ps(_mm512_add_ps(dot[0], dot[1])) / c.columns;
  // rstd (g - mean_g - xhat mean_gx) = rstd g - rstd mean_gx (rstd x - rstd mean) - rstd mean_g
  const __m512 a = constant(-rstd * mean_gx * rstd), b = constant(rstd * (mean_gx * mean * rstd - mean_g));
  for (int64_t n = 0; n < blocks; ++n) {
    const Row g = read(c.dxhat, block, r, n), x = read(c.x, block, r, n);
    Row d = {_mm512_fmadd_ps(g.low, s, _mm512_fmadd_ps(x.low, a, b)), _mm512_fmadd_ps(g.high, s, _mm512_fmadd_ps(x.high, a, b))};
    if (c.dsum.data != nullptr) {
      const Row sum_gradient = read(c.dsum, block, r, n);
      d = {_mm512_add_ps(d.low, sum_gradient.low), _mm512_add_ps(d.high, sum_gradient.high)};
    }
    write(c.dx, block, r, n, d);
  }
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(layer_norm_backward)(const fastpeft::LayerNormBackward* call) {
  using namespace fastpeft;
  const int64_t threads = smaller<int64_t>(call->threads, ceil_div(call->rows, kBlock));
  parallel(static_cast<int>(threads), [&](int index) {
    const Range mine = part_of(call->rows, threads, index);
    for (int64_t row = mine.begin; row < mine.end; ++row) run_row(*call, row);
  });
  return kOk;
}
