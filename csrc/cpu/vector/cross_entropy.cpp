// -log softmax(z)[target] of every row, and its gradient in the place of z. fastpeft/native/vector/cross_entropy.py lays
// this out.

#include "vector.h"

namespace fastpeft {
namespace {

struct CrossEntropy {
  int64_t rows, columns;
  void* values;  // (rows, columns): z in; softmax(z) less one at the target out, if the gradient is wanted
  const int64_t* targets;
  float* losses;
  int32_t gradient, threads, half, unused;
};

template <class T>
FASTPEFT_INLINE float number(const T* p) {
  return load(p, Part{1})[0];
}

// Something else beyond what is meant.
FASTPEFT_INLINE Floats among(Floats x, float, Whole) { return x; }
FASTPEFT_INLINE Floats among(Floats x, float other, Part part) {
  return lanes() < static_cast<int32_t>(part.count) ? x : all(other);
}

template <class T>
float row(T* values, int64_t columns, int64_t target, bool gradient) {
  constexpr float lowest = -__builtin_huge_valf();
  Floats tops[4] = {all(lowest), all(lowest), all(lowest), all(lowest)};
  over(columns, [&](int64_t i, auto how, int k) { tops[k] = larger(tops[k], among(load(values + i, how), lowest, how)); });
  const float top = largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
  const float shift = -top * kLog2E;
  Floats sums[4] = {};
  over(columns, [&](int64_t i, auto how, int k) {
    sums[k] += within(exp2(load(values + i, how) * kLog2E + shift), how);
  });
  const float total = sum(sums), chosen = number(values + target);
  if (gradient) {
    const float factor = 1.0f / total;
    const Floats wanted = exp2(all(chosen * kLog2E + shift)) * factor - 1.0f;
    over(columns, [&](int64_t i, auto how, int) {
      store(values + i, exp2(load(values + i, how) * kLog2E + shift) * factor, how);
    });
    store(values + target, wanted, Part{1});
  }
  return __builtin_logf(total) + top - chosen;
}

template <class T>
int32_t rows(const CrossEntropy& a) {
  const int threads = team(a.threads, a.rows);
  bool inside = true;
  parallel(threads, [&](int index) {
    const Range mine = part_of(a.rows, threads, index);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t target = a.targets[r];
      if (target < 0 || target >= a.columns) {
        __atomic_store_n(&inside, false, __ATOMIC_RELAXED);
        return;
      }
      a.losses[r] = row(static_cast<T*>(a.values) + r * a.columns, a.columns, target, a.gradient != 0);
    }
  });
  return inside ? kOk : kOutOfRange;
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(cross_entropy)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::CrossEntropy*>(arguments);
  return a.half ? fastpeft::rows<fastpeft::bf16>(a) : fastpeft::rows<float>(a);
}
