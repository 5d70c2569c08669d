// Attention of tokens to tokens and prompts, a head of a sample at a time.
//
// The head's keys and values are packed as right factors once; then, for some dozens of queries at a time, the scores of all
// keys, the probabilities without their denominator, and their product with the values, whose rows are divided at the end.

#include "prompt_attention.h"

namespace fastpeft {
namespace {

struct ForwardTag;

template <class T>
class Forward {
 public:
  Forward(const Attention& a, float* memory) : a_(a), n_(a) {
    keys_ = memory;
    values_ = keys_ + n_.transposed;
    left_ = values_ + n_.panels;
    out_ = left_ + n_.block * n_.width;
    scores_ = out_ + n_.block * n_.width;
  }

  static int64_t size(const Attention& a) {
    const Extent n(a);
    return n.transposed + n.panels + n.block * (2 * n.width + n.line);
  }

  // Queries of a head of a sample.
  void run(int64_t b, int64_t h, Range queries) {
    put_transposed<T>(a_, a_.k, a_.prompt_k, b, h, 0, keys_);
    put_plain<T>(a_, a_.v, a_.prompt_v, b, h, values_);
    for (int64_t i = queries.begin; i < queries.end; i += n_.block)
      attend(b, h, i, smaller(n_.block, queries.end - i));
  }

 private:
  void attend(int64_t b, int64_t h, int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r) put_row(row_of<const T>(a_.q, b, h, first + r), a_.dim, left_ + r * n_.width);
    zero_rows(left_, count, n_.width);
    multiply<false, false>(count, n_.keys, a_.dim, left_, n_.width, keys_, a_.dim, scores_, n_.line);
    float denominators[48];
    const bool plain = !a_.bias && !a_.causal && !a_.row_words;
    for (int64_t r = 0; r < count; ++r)
      denominators[r] = plain ? softmax<true>(b, h, first + r, scores_ + r * n_.line)
                              : softmax<false>(b, h, first + r, scores_ + r * n_.line);
    multiply<false, false>(count, a_.dim, n_.keys, scores_, n_.line, values_, n_.keys, out_, n_.width);
    for (int64_t r = 0; r < count; ++r) {
      const float factor = denominators[r] > 0.0f ? 1.0f / denominators[r] : denominators[r];
      T* out = row_of<T>(a_.out, b, h, first + r);
      const float* sums = out_ + r * n_.width;
      over(a_.dim, [&](int64_t d, auto how, int) { store(out + d, load(sums + d) * factor, how); });
    }
  }

  // A row of scores to probabilities without their denominator, which is returned. `plain`: nothing but scores decides.
  template <bool plain>
  FASTPEFT_INLINE float softmax(int64_t b, int64_t h, int64_t i, float* line) {
    const Row row(a_, b, h, i);
    const int64_t end = plain ? n_.keys / kWidth * kWidth : n_.keys;
    Floats most[4];
    for (Floats& m : most) m = all(-kInfinity);
    over_keys(0, end, [&](int64_t j, int k) {
      Floats x = load(line + j);
      if constexpr (!plain) {
        x = row.logits(x, j);
        store(line + j, x);
      }
      most[k] = larger(x, most[k]);
    });
    if (plain && end < n_.keys) {
      const Floats x = lanes() < static_cast<int32_t>(n_.keys - end) ? load(line + end) : all(-kInfinity);
      store(line + end, x);
      most[0] = larger(x, most[0]);
    }
    float top = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
    if constexpr (plain) top *= a_.scale;
    // Nothing is seen: all exponentials are 0.
    const float shift = top == -kInfinity ? 0.0f : top;
    Floats total[4] = {};
    over_keys(0, n_.keys, [&](int64_t j, int k) {
      Floats x = load(line + j);
      if constexpr (plain) x *= a_.scale;
      x = exp(x - shift);
      total[k] += x;
      if constexpr (!plain) x *= row.kept(j);
      store(line + j, x);
    });
    const float denominator = sum(total);
    a_.lse[(b * a_.heads + h) * a_.queries + i] = denominator == 0.0f ? -kInfinity : shift + __builtin_logf(denominator);
    return denominator;
  }

  const Attention& a_;
  const Extent n_;
  float *keys_, *values_, *left_, *out_, *scores_;
};

template <class T>
int32_t forward(const Attention& a) {
  const int64_t items = a.batch * a.heads;
  // With fewer heads than threads, a head's queries are shared out, too.
  const int64_t blocks = ceil_div(a.queries, Extent(a).block);
  const int64_t parts = items >= a.threads || items == 0 ? 1 : smaller(blocks, ceil_div<int64_t>(a.threads, items));
  const int threads = team(a.threads, items * parts);
  bool enough = true;
  parallel(threads, [&](int index) {
    auto* memory = static_cast<float*>(scratch<ForwardTag>(Forward<T>::size(a) * sizeof(float)));
    if (memory == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    Forward<T> head(a, memory);
    const Range mine = part_of(items * parts, threads, index);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t which = item / parts;
      head.run(which / a.heads, which % a.heads, part_of(a.queries, parts, item % parts));
    }
  });
  return enough ? kOk : kNoMemory;
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(prompt_attention_forward)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::Attention*>(arguments);
  return a.half ? fastpeft::forward<fastpeft::bf16>(a) : fastpeft::forward<float>(a);
}
