// The gradient of a LayerNorm whose weight and bias are folded into the product behind it, and the sum beside it:
//
//   dx = dsum + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)),   xhat = (x - mean) * rstd
//
// Where they are trained, they are not folded in: dxhat = weight * dy, and their gradients are sums of dy * xhat and dy.

#include "matrix.h"

namespace fastpeft {

struct LayerNormBackward {
  int64_t rows, columns;  // columns are a multiple of 32
  Matrix dxhat, x, dsum, dx;  // dsum may be null
  const float* statistics;    // 2 x rows: means, then reciprocal deviations
  const float* weight;        // columns, if `dxhat` is dy; or null
  float* sums;                // parts x 2 x columns: of dy * xhat and of dy over a part of the rows; or null
  int64_t parts;
  int32_t threads;
};

namespace {

FASTPEFT_INLINE Row weighted(const LayerNormBackward& c, Row g, int64_t n) {
  return {_mm512_mul_ps(g.low, _mm512_loadu_ps(c.weight + n * kBlock)),
          _mm512_mul_ps(g.high, _mm512_loadu_ps(c.weight + n * kBlock + 16))};
}

FASTPEFT_INLINE void add_to(float* sums, __m512 low, __m512 high) {
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), low));
  _mm512_storeu_ps(sums + 16, _mm512_add_ps(_mm512_loadu_ps(sums + 16), high));
}

template <bool trained>
void run_row(const LayerNormBackward& c, int64_t row, float* sums) {
  const int64_t blocks = c.columns / kBlock, block = row / kBlock, r = row % kBlock;
  const float mean = c.statistics[row], rstd = c.statistics[c.rows + row];
  const __m512 s = constant(rstd), shift = constant(-mean * rstd);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, dot[2] = {sum[0], sum[0]};
  for (int64_t n = 0; n < blocks; ++n) {
    Row g = read(c.dxhat, block, r, n);
    const Row x = read(c.x, block, r, n);
    const Row xhat = {_mm512_fmadd_ps(x.low, s, shift), _mm512_fmadd_ps(x.high, s, shift)};
    if constexpr (trained) {
      add_to(sums + n * kBlock, _mm512_mul_ps(g.low, xhat.low), _mm512_mul_ps(g.high, xhat.high));
      add_to(sums + c.columns + n * kBlock, g.low, g.high);
      g = weighted(c, g, n);
    }
    sum[0] = _mm512_add_ps(sum[0], g.low);
    sum[1] = _mm512_add_ps(sum[1], g.high);
    dot[0] = _mm512_fmadd_ps(g.low, xhat.low, dot[0]);
    dot[1] = _mm512_fmadd_ps(g.high, xhat.high, dot[1]);
  }
  if (c.dx.data == nullptr) return;
  const float mean_g = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / c.columns;
  const float mean_gx = _mm512_reduce_add_ps(_mm512_add_ps(dot[0], dot[1])) / c.columns;
  // rstd (g - mean_g - xhat mean_gx) = rstd g - rstd mean_gx (rstd x - rstd mean) - rstd mean_g
  const __m512 a = constant(-rstd * mean_gx * rstd), b = constant(rstd * (mean_gx * mean * rstd - mean_g));
  for (int64_t n = 0; n < blocks; ++n) {
    Row g = read(c.dxhat, block, r, n);
    const Row x = read(c.x, block, r, n);
    if constexpr (trained) g = weighted(c, g, n);
    Row d = {_mm512_fmadd_ps(g.low, s, _mm512_fmadd_ps(x.low, a, b)), _mm512_fmadd_ps(g.high, s, _mm512_fmadd_ps(x.high, a, b))};
    if (c.dsum.data != nullptr) {
      const Row sum_gradient = read(c.dsum, block, r, n);
      d = {_mm512_add_ps(d.low, sum_gradient.low), _mm512_add_ps(d.high, sum_gradient.high)};
    }
    write(c.dx, block, r, n, d);
  }
}

void run(const LayerNormBackward& c, Range mine, int64_t part) {
  if (c.weight == nullptr) {
    for (int64_t row = mine.begin; row < mine.end; ++row) run_row<false>(c, row, nullptr);
    return;
  }
  float* sums = c.sums + part * 2 * c.columns;
  std::memset(sums, 0, 2 * c.columns * sizeof(float));
  for (int64_t row = mine.begin; row < mine.end; ++row) run_row<true>(c, row, sums);
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(layer_norm_backward)(const fastpeft::LayerNormBackward* call) {
  using namespace fastpeft;
  const int threads = team(call->threads, call->parts);
  parallel(threads, [&](int thread) {
    for (int64_t part = thread; part < call->parts; part += threads)
      run(*call, part_of(call->rows, call->parts, part), part);
  });
  return kOk;
}
