// Gradients of attention, a head of a sample at a time, a block of queries at a time:
//
//     P = exp(scores - lse),   dP = dO V^T,   dS = P (dP - sum_j P dP)
//     dQ = scale dS K,   dK += scale dS^T Q,   dV += P^T dO
//
// The sum is that of dO O, too, which is what is computed where O is not rounded; in bf16 its rounding would be what is left
// where the keys have much in common. Only what is asked for is computed: where neither queries nor tokens need gradients,
// and the sum does not need all keys, the prompts' columns alone.

#include "prompt_attention.h"

namespace fastpeft {
namespace {

struct BackwardTag;

template <class T>
class Backward {
 public:
  Backward(const Attention& a, float* memory)
      : a_(a),
        n_(a),
        needs_q_(a.dq.data),
        needs_scores_(a.dq.data || a.dk.data || a.dprompt_k),
        keys_needed_(rows_of(a.dk.data, a.dprompt_k)),
        values_needed_(rows_of(a.dv.data, a.dprompt_v)) {
    const int64_t from = smaller(keys_needed_.begin, values_needed_.begin);
    first_ = needs_q_ || (kRounded && needs_scores_) ? 0 : from / kPanel * kPanel;
    const auto take = [&](int64_t count) {
      float* mine = memory;
      memory += count;
      return mine;
    };
    keys_ = take(n_.transposed);
    values_ = take(n_.transposed);
    plain_keys_ = take(n_.panels);
    q_panels_ = take(n_.block * whole_panels(a.dim));
    dout_panels_ = take(n_.block * whole_panels(a.dim));
    q_ = take(n_.block * n_.width);
    dout_ = take(n_.block * n_.width);
    dq_ = take(n_.block * n_.width);
    p_ = take(n_.block * n_.line);
    ds_ = take(n_.block * n_.line);
    dk_ = take((n_.keys + kFewer) * n_.width);
    dv_ = take((n_.keys + kFewer) * n_.width);
  }

  static int64_t size(const Attention& a) {
    const Extent n(a);
    return 2 * n.transposed + n.panels + n.block * (2 * whole_panels(a.dim) + 3 * n.width + 2 * n.line) +
           2 * (n.keys + kFewer) * n.width;
  }

  // A head of a sample; sums for prompts are added to.
  void run(int64_t b, int64_t h, float* dprompt_k, float* dprompt_v) {
    if (a_.queries <= kFew)
      few(b, h);
    else
      many(b, h);
    finish(dk_, a_.dk, dprompt_k, b, h, a_.scale);
    finish(dv_, a_.dv, dprompt_v, b, h, 1.0f);
  }

 private:
  // Queries for which it is not worth to bring keys and values into panels.
  static constexpr int64_t kFew = 4;
  // O is not what the probabilities give.
  static constexpr bool kRounded = sizeof(T) == 2;

  // Keys whose gradient is needed, tokens' or prompts'.
  Range rows_of(const void* tokens, const void* prompts) const {
    const Range found = {tokens ? 0 : a_.tokens, prompts ? n_.keys : a_.tokens};
    return tokens || prompts ? found : Range{n_.keys, n_.keys};
  }

  void many(int64_t b, int64_t h) {
    put_transposed<T>(a_, a_.k, a_.prompt_k, b, h, first_, keys_);
    if (needs_scores_) put_transposed<T>(a_, a_.v, a_.prompt_v, b, h, first_, values_);
    if (needs_q_) put_plain<T>(a_, a_.k, a_.prompt_k, b, h, plain_keys_);
    __builtin_memset(dk_, 0, (n_.keys + kFewer) * n_.width * sizeof(float));
    __builtin_memset(dv_, 0, (n_.keys + kFewer) * n_.width * sizeof(float));
    for (int64_t i = 0; i < a_.queries; i += n_.block) block(b, h, i, smaller(n_.block, a_.queries - i));
  }

  void block(int64_t b, int64_t h, int64_t first, int64_t count) {
    float sums[48];
    for (int64_t r = 0; r < count; ++r) {
      sums[r] = read(b, h, first + r, r);
      put_panels(q_ + r * n_.width, a_.dim, r, n_.block, q_panels_);
      put_panels(dout_ + r * n_.width, a_.dim, r, n_.block, dout_panels_);
    }
    zero_rows(q_, count, n_.width);
    zero_rows(dout_, count, n_.width);
    const int64_t columns = n_.keys - first_;
    multiply<false, false>(count, columns, a_.dim, q_, n_.width, keys_ + first_ * a_.dim, a_.dim, p_ + first_, n_.line);
    if (needs_scores_)
      multiply<false, false>(count, columns, a_.dim, dout_, n_.width, values_ + first_ * a_.dim, a_.dim, ds_ + first_,
                             n_.line);
    for (int64_t r = 0; r < count; ++r) probabilities(b, h, first + r, sums[r], p_ + r * n_.line, ds_ + r * n_.line);
    if (needs_q_) {
      multiply<false, false>(count, a_.dim, n_.keys, ds_, n_.line, plain_keys_, n_.keys, dq_, n_.width);
      for (int64_t r = 0; r < count; ++r) store_dq(b, h, first + r, r);
    }
    add_products(keys_needed_, count, ds_, q_panels_, dk_);
    add_products(values_needed_, count, p_, dout_panels_, dv_);
  }

  // Query i and what arrives at its output, as row r; returns the sum of dO O, unless O is rounded.
  FASTPEFT_INLINE float read(int64_t b, int64_t h, int64_t i, int64_t r) {
    const T *dout = row_of<const T>(a_.dout, b, h, i), *out = row_of<const T>(a_.out, b, h, i);
    put_row(row_of<const T>(a_.q, b, h, i), a_.dim, q_ + r * n_.width);
    put_row(dout, a_.dim, dout_ + r * n_.width);
    if (kRounded) return 0.0f;
    Floats total[4] = {};
    over(a_.dim, [&](int64_t d, auto how, int k) { total[k] += load(dout + d, how) * load(out + d, how); });
    return sum(total);
  }

  FASTPEFT_INLINE void store_dq(int64_t b, int64_t h, int64_t i, int64_t r) {
    T* dq = row_of<T>(a_.dq, b, h, i);
    over(a_.dim, [&](int64_t d, auto how, int) { store(dq + d, load(dq_ + r * n_.width + d) * a_.scale, how); });
  }

  // The same for all queries, which are a few, key by key.
  void few(int64_t b, int64_t h) {
    float sums[kFew];
    for (int64_t r = 0; r < a_.queries; ++r) {
      sums[r] = read(b, h, r, r);
      for (int64_t j = first_; j < n_.keys; ++j) {
        const T *k = key_row<T>(a_, a_.k, a_.prompt_k, b, h, j), *v = key_row<T>(a_, a_.v, a_.prompt_v, b, h, j);
        p_[r * n_.line + j] = dot(q_ + r * n_.width, k);
        if (needs_scores_) ds_[r * n_.line + j] = dot(dout_ + r * n_.width, v);
      }
      for (int64_t j = n_.keys; j < whole_vectors(n_.keys); ++j) p_[r * n_.line + j] = ds_[r * n_.line + j] = 0.0f;
      probabilities(b, h, r, sums[r], p_ + r * n_.line, ds_ + r * n_.line);
    }
    for (int64_t r = 0; needs_q_ && r < a_.queries; ++r) {
      float* dq = dq_ + r * n_.width;
      __builtin_memset(dq, 0, n_.width * sizeof(float));
      for (int64_t j = 0; j < n_.keys; ++j) {
        const T* k = key_row<T>(a_, a_.k, a_.prompt_k, b, h, j);
        const float factor = ds_[r * n_.line + j];
        over(a_.dim, [&](int64_t d, auto how, int) { store(dq + d, load(dq + d) + load(k + d, how) * factor); });
      }
      store_dq(b, h, r, r);
    }
    put_products(keys_needed_, ds_, q_, dk_);
    put_products(values_needed_, p_, dout_, dv_);
  }

  FASTPEFT_INLINE float dot(const float* a, const T* b) const {
    Floats total[4] = {};
    over(a_.dim, [&](int64_t d, auto how, int k) { total[k] += load(a + d) * load(b + d, how); });
    return sum(total);
  }

  // Sums over all queries of left[query][key] right[query].
  FASTPEFT_INLINE void put_products(Range keys, const float* left, const float* right, float* out) {
    for (int64_t j = keys.begin; j < keys.end; ++j)
      over(a_.dim, [&](int64_t d, auto, int) {
        Floats total = {};
        for (int64_t r = 0; r < a_.queries; ++r) total += load(right + r * n_.width + d) * left[r * n_.line + j];
        store(out + j * n_.width + d, total);
      });
  }

  FASTPEFT_INLINE void add_products(Range rows, int64_t count, const float* left, const float* right, float* out) {
    multiply<true, true>(rows.end - rows.begin, a_.dim, count, left + rows.begin, n_.line, right, n_.block,
                         out + rows.begin * n_.width, n_.width);
  }

  void probabilities(int64_t b, int64_t h, int64_t i, float total, float* p, float* ds) {
    if (!a_.bias && !a_.causal && !a_.row_words)
      probabilities_as<true>(b, h, i, total, p, ds);
    else
      probabilities_as<false>(b, h, i, total, p, ds);
  }

  // Scores to probabilities, as dropout leaves them, and dP to dS.
  template <bool plain>
  FASTPEFT_INLINE void probabilities_as(int64_t b, int64_t h, int64_t i, float total, float* p, float* ds) {
    const Row row(a_, b, h, i);
    const float lse = a_.lse[(b * a_.heads + h) * a_.queries + i];
    const float shift = lse == -kInfinity ? 0.0f : lse;
    Floats products[4] = {};
    over_keys(first_, n_.keys, [&](int64_t j, [[maybe_unused]] int k) {
      Floats x = load(p + j);
      if constexpr (plain) {
        x *= a_.scale;
        if (j + kWidth > n_.keys) x = lanes() < static_cast<int32_t>(n_.keys - j) ? x : all(-kInfinity);
      } else {
        x = row.logits(x, j);
      }
      x = exp(x - shift);
      if constexpr (kRounded) {
        store(p + j, x);
        if (needs_scores_) {
          const Floats slope = plain ? load(ds + j) : row.kept(j) * load(ds + j);
          // Beyond the last key there is nothing but zeros.
          products[k] += x * slope;
          store(ds + j, slope);
        }
        return;
      }
      const Floats kept = plain ? x : x * row.kept(j);
      store(p + j, kept);
      if (needs_scores_) store(ds + j, kept * load(ds + j) - x * total);
    });
    if constexpr (kRounded) {
      total = sum(products);
      over_keys(first_, n_.keys, [&](int64_t j, int) {
        const Floats x = load(p + j);
        if (needs_scores_) store(ds + j, x * (load(ds + j) - total));
        if constexpr (!plain) store(p + j, x * row.kept(j));
      });
    }
  }

  // Sums of a head to where they belong.
  void finish(const float* sums, const Heads& tokens, float* prompts, int64_t b, int64_t h, float factor) {
    if (tokens.data)
      for (int64_t j = 0; j < a_.tokens; ++j) {
        T* out = row_of<T>(tokens, b, h, j);
        over(a_.dim, [&](int64_t d, auto how, int) { store(out + d, load(sums + j * n_.width + d) * factor, how); });
      }
    if (prompts)
      for (int64_t j = 0; j < a_.prompts; ++j) {
        const float* mine = sums + (a_.tokens + j) * n_.width;
        float* out = prompts + j * a_.dim;
        over(a_.dim, [&](int64_t d, auto how, int) { store(out + d, load(out + d, how) + load(mine + d) * factor, how); });
      }
  }

  const Attention& a_;
  const Extent n_;
  const bool needs_q_, needs_scores_;
  const Range keys_needed_, values_needed_;
  int64_t first_;  // key whose score is needed, in whole panels
  float *keys_, *values_, *plain_keys_, *q_panels_, *dout_panels_, *q_, *dout_, *dq_, *p_, *ds_, *dk_, *dv_;
};

template <class T>
int32_t backward(const Attention& a) {
  const int64_t items = a.parts * a.heads, threads = team(a.threads, items);
  bool enough = true;
  parallel(static_cast<int>(threads), [&](int index) {
    auto* memory = static_cast<float*>(scratch<BackwardTag>(Backward<T>::size(a) * sizeof(float)));
    if (memory == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    Backward<T> head(a, memory);
    const Range mine = part_of(items, threads, index);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const Range samples = part_of(a.batch, a.parts, item / a.heads);
      float* dprompt_k = a.dprompt_k ? a.dprompt_k + item * a.prompts * a.dim : nullptr;
      float* dprompt_v = a.dprompt_v ? a.dprompt_v + item * a.prompts * a.dim : nullptr;
      for (int64_t b = samples.begin; b < samples.end; ++b) head.run(b, item % a.heads, dprompt_k, dprompt_v);
    }
  });
  return enough ? kOk : kNoMemory;
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(prompt_attention_backward)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::Attention*>(arguments);
  return a.half ? fastpeft::backward<fastpeft::bf16>(a) : fastpeft::backward<float>(a);
}
