// s = x + gamma * branch, y = (s - mean) * rstd * weight + bias, and gradients. fastpeft/native/vector/layer_norm.py lays
// this out.
//
// A row is read from memory once; what is needed of it again lies in the first cache.

#include "vector.h"

namespace fastpeft {
namespace {

// Rows of d numbers side by side: row r is at data + (r / rows) * batch + (r % rows) * row.
struct Rows {
  void* data;
  int64_t batch, row;
};

struct LayerNorm {
  int64_t count, rows, columns;  // all rows, those of a batch entry
  Rows x, branch, s, y;          // s is null without a branch
  const float *gamma, *weight, *bias;  // columns, or null
  float *mean, *rstd;                  // count
  float epsilon;
  int32_t threads;
  // Backward: dx and dbranch are null where not needed; without gamma dbranch is dx and not written apart.
  Rows dy, ds, dx, dbranch;
  float *dweight, *dbias;  // (parts, columns) sums over a part of the rows each, or null
  int64_t parts;
  int32_t half;  // x and its like are bf16, not fp32
  int32_t unused;
};

template <class T>
FASTPEFT_INLINE T* row_of(const Rows& m, int64_t rows, int64_t r) {
  return m.data == nullptr ? nullptr : static_cast<T*>(m.data) + (r / rows) * m.batch + (r % rows) * m.row;
}

struct RowTag;

// A row's sum and its normalisation; `held` has room for the sum in fp32.
template <class T>
FASTPEFT_INLINE void forward_row(const LayerNorm& a, int64_t r, float* held) {
  const T *x = row_of<T>(a.x, a.rows, r), *branch = row_of<T>(a.branch, a.rows, r);
  T *s = row_of<T>(a.s, a.rows, r), *y = row_of<T>(a.y, a.rows, r);
  const int64_t d = a.columns;
  Floats total[4] = {}, squares[4] = {};
  if (branch == nullptr) {
    over(d, [&](int64_t i, auto how, int k) {
      const Floats v = load(x + i, how);
      total[k] += v;
      store(held + i, v);
    });
  } else {
    over(d, [&](int64_t i, auto how, int k) {
      const Floats g = a.gamma ? load(a.gamma + i, how) : all(1.0f);
      // Rounded before the statistics, which the backward pass applies to what is stored.
      const Floats v = rounded(s, load(branch + i, how) * g + load(x + i, how));
      total[k] += v;
      store(held + i, v);
      store(s + i, v, how);
    });
  }
  const float mean = sum(total) / static_cast<float>(d);
  over(d, [&](int64_t i, auto how, int k) {
    const Floats c = within(load(held + i) - mean, how);
    squares[k] += c * c;
  });
  const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(d) + a.epsilon);
  over(d, [&](int64_t i, auto how, int) {
    Floats v = (load(held + i) - mean) * rstd;
    if (a.weight) v *= load(a.weight + i, how);
    if (a.bias) v += load(a.bias + i, how);
    store(y + i, v, how);
  });
  a.mean[r] = mean;
  a.rstd[r] = rstd;
}

// Gradients of a row; `g` and `xhat` have room for it.
template <class T>
FASTPEFT_INLINE void backward_row(const LayerNorm& a, int64_t r, float* g, float* xhat, float* dweight, float* dbias) {
  const T *dy = row_of<T>(a.dy, a.rows, r), *s = row_of<T>(a.s, a.rows, r), *ds = row_of<T>(a.ds, a.rows, r);
  T *dx = row_of<T>(a.dx, a.rows, r), *dbranch = row_of<T>(a.dbranch, a.rows, r);
  const int64_t d = a.columns;
  const float mean = a.mean[r], rstd = a.rstd[r];
  Floats shift[4] = {}, slope[4] = {};
  // Beyond the last column dy is zero, and so is all that is summed.
  over(d, [&](int64_t i, auto how, int k) {
    const Floats slope_y = load(dy + i, how), h = (load(s + i, how) - mean) * rstd;
    const Floats v = a.weight ? slope_y * load(a.weight + i, how) : slope_y;
    shift[k] += v;
    slope[k] += v * h;
    store(g + i, v);
    store(xhat + i, h);
    if (dweight) store(dweight + i, load(dweight + i, how) + slope_y * h, how);
    if (dbias) store(dbias + i, load(dbias + i, how) + slope_y, how);
  });
  if (dx == nullptr && dbranch == nullptr) return;
  const float mean_g = sum(shift) / static_cast<float>(d), mean_gx = sum(slope) / static_cast<float>(d);
  over(d, [&](int64_t i, auto how, int) {
    Floats v = (load(g + i) - mean_g - load(xhat + i) * mean_gx) * rstd;
    if (ds) v += load(ds + i, how);
    if (dx) store(dx + i, v, how);
    if (dbranch) store(dbranch + i, v * load(a.gamma + i, how), how);
  });
}

template <class T>
int32_t forward(const LayerNorm& a) {
  const int threads = team(a.threads, a.count);
  bool enough = true;
  parallel(threads, [&](int index) {
    auto* held = static_cast<float*>(scratch<RowTag>(2 * whole_vectors(a.columns) * sizeof(float)));
    if (held == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Range mine = part_of(a.count, threads, index);
    for (int64_t r = mine.begin; r < mine.end; ++r) forward_row<T>(a, r, held);
  });
  return enough ? kOk : kNoMemory;
}

template <class T>
int32_t backward(const LayerNorm& a) {
  const int threads = team(a.threads, a.parts);
  bool enough = true;
  parallel(threads, [&](int index) {
    const int64_t width = whole_vectors(a.columns);
    auto* held = static_cast<float*>(scratch<RowTag>(2 * width * sizeof(float)));
    if (held == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Range mine = part_of(a.parts, threads, index);
    for (int64_t part = mine.begin; part < mine.end; ++part) {
      float* dweight = a.dweight ? a.dweight + part * a.columns : nullptr;
      float* dbias = a.dbias ? a.dbias + part * a.columns : nullptr;
      for (int64_t i = 0; i < a.columns; ++i) {
        if (dweight) dweight[i] = 0.0f;
        if (dbias) dbias[i] = 0.0f;
      }
      const Range rows = part_of(a.count, a.parts, part);
      for (int64_t r = rows.begin; r < rows.end; ++r) backward_row<T>(a, r, held, held + width, dweight, dbias);
    }
  });
  return enough ? kOk : kNoMemory;
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(layer_norm_forward)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::LayerNorm*>(arguments);
  return a.half ? fastpeft::forward<fastpeft::bf16>(a) : fastpeft::forward<float>(a);
}

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(layer_norm_backward)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::LayerNorm*>(arguments);
  return a.half ? fastpeft::backward<fastpeft::bf16>(a) : fastpeft::backward<float>(a);
}
