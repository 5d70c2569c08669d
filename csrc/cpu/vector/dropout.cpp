// Rows that a batch shares, each sample's copy with a dropout mask of its own, and the sum of its gradient over the batch.
//
//   out[s, i] = x[i] * mask[s, i],   dx[i] = sum over s of dout[s, i] * mask[s, i]
//   mask[s, i] = scale if hash(row_words[s] ^ column_words[i]) >= threshold, else 0
//
// The hash is the last step of fastpeft/ops/dropout_mask.py; no mask is ever in memory.

#include "vector.h"

namespace fastpeft {

struct Dropout {
  int64_t samples, size;
  const void* x;    // size; samples x size in the backward pass
  void* out;        // samples x size; fp32 and size in the backward pass
  const int32_t* row_words;
  const int32_t* column_words;
  int32_t threshold;
  float scale;
  int32_t threads;
  int32_t half;  // x (and out in the forward pass) is bf16, else fp32
};

namespace {

FASTPEFT_INLINE Floats mask_of(const Dropout& d, int64_t sample, int64_t i) {
  Bits z = (Bits)(*reinterpret_cast<const IntsAt*>(d.column_words + i) ^ all(d.row_words[sample]));
  z *= 0x7FEB352Du;
  z ^= z >> 15;
  z *= 0x846CA68Bu;
  z ^= z >> 16;
  return (Floats)(((Ints)z >= all(d.threshold)) & (Ints)all(d.scale));
}

// Numbers are done kWidth at a time; the last group is moved back so that it ends with the row.
template <class Work>
FASTPEFT_INLINE void for_each_group(const Dropout& d, const Work& work) {
  const int64_t groups = ceil_div<int64_t>(d.size, kWidth);
  const int threads = team(d.threads, groups);
  parallel(threads, [&](int index) { work(part_of(groups, threads, index)); });
}

template <class T>
void run_forward(const Dropout& d) {
  const auto* x = static_cast<const T*>(d.x);
  for_each_group(d, [&](Range mine) {
    for (int64_t s = 0; s < d.samples; ++s)
      for (int64_t g = mine.begin; g < mine.end; ++g) {
        const int64_t i = smaller<int64_t>(g * kWidth, d.size - kWidth);
        store(static_cast<T*>(d.out) + s * d.size + i, load(x + i) * mask_of(d, s, i));
      }
  });
}

template <class T>
void run_backward(const Dropout& d) {
  const auto* dout = static_cast<const T*>(d.x);
  for_each_group(d, [&](Range mine) {
    for (int64_t g = mine.begin; g < mine.end; ++g) {
      const int64_t i = smaller<int64_t>(g * kWidth, d.size - kWidth);
      Floats sum = {};
      for (int64_t s = 0; s < d.samples; ++s) sum += load(dout + s * d.size + i) * mask_of(d, s, i);
      store(static_cast<float*>(d.out) + i, sum);
    }
  });
}

}  // namespace
}  // namespace fastpeft

// size is at least 16 in both.
FASTPEFT_EXPORT int32_t FASTPEFT_NAME(dropout_forward)(const fastpeft::Dropout* call) {
  using namespace fastpeft;
  call->half ? run_forward<bf16>(*call) : run_forward<float>(*call);
  return kOk;
}

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(dropout_backward)(const fastpeft::Dropout* call) {
  using namespace fastpeft;
  call->half ? run_backward<bf16>(*call) : run_backward<float>(*call);
  return kOk;
}
