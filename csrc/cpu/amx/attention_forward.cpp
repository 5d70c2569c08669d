// Attention of tokens to tokens and prompts, a head of a sample at a time.
//
// The head's keys and values are packed as right factors once; then, for 32 queries at a time, the scores of all keys, the
// probabilities without their denominator, and their product with the values, whose rows are divided at the end. The
// matrix unit is ahead: it computes the next queries' scores while these queries' become probabilities, and a product
// with values while the product before is divided.

#include "attention.h"
#include "epilogues.h"

namespace fastpeft {
namespace {

struct ForwardTag;

class Forward {
 public:
  Forward(const Attention& a, bf16* memory) : whole_(a), a_(a), n_(a) {
    keys_ = take(memory, n_.keys * n_.widths);
    values_ = take(memory, n_.keys * n_.widths);
    left_ = take(memory, n_.widths);
    probabilities_ = take(memory, n_.keys);
    for (float*& scores : scores_) scores = reinterpret_cast<float*>(take(memory, 2 * n_.keys));
    for (float*& sums : sums_) sums = reinterpret_cast<float*>(take(memory, 2));
  }

  static int64_t blocks(const Attention& a) {
    const Extent n(a);
    return 2 * n.keys * n.widths + n.widths + 5 * n.keys + 4;
  }

  // `fresh`: another head than in the call before.
  void run(int64_t b, int64_t h, bool fresh) {
    if (whole_.lengths != nullptr) {
      a_ = of_sample(whole_, b);
      n_ = Extent(a_);
      fresh = true;
    }
    pack(b, h, fresh);
    load_queries(b, h, 0);
    for (int64_t j = 0; j < n_.keys; ++j) score(0, j);
    for (int64_t i = 0; i < n_.queries; ++i) attend(b, h, i);
  }

 private:
  // Packs the blocks of keys; those of prompts alone stay from sample to sample where the batch shares them.
  void pack(int64_t b, int64_t h, bool fresh) {
    const Source k = {&a_.k, &a_.prompt_k, a_.dim, b, h, a_.tokens, a_.prompts};
    const Source v = {&a_.v, &a_.prompt_v, a_.dim, b, h, a_.tokens, a_.prompts};
    const bool keeps = !fresh && a_.prompt_k.batch == 0;
    const int64_t end = keeps ? ceil_div(a_.tokens, kBlock) : n_.keys;
    __m512i rows[kBlock];
    for (int64_t j = 0; j < end; ++j)
      for (int64_t w = 0; w < n_.widths; ++w) {
        k.rows(j, w * kBlock, rows);
        put_right_transposed(rows, keys_ + (j * n_.widths + w) * kBlockSize);
        v.rows(j, w * kBlock, rows);
        put_right(rows, values_ + (w * n_.keys + j) * kBlockSize);
      }
  }

  void load_queries(int64_t b, int64_t h, int64_t i) {
    const Source q = {&a_.q, nullptr, a_.dim, b, h, a_.queries, 0};
    __m512i rows[kBlock];
    for (int64_t w = 0; w < n_.widths; ++w) {
      q.rows(i, w * kBlock, rows);
      put_left(rows, left_ + w * kBlockSize);
    }
  }

  // Scores of the queries that are loaded, block i of them, with a block of keys.
  FASTPEFT_INLINE void score(int64_t i, int64_t j) {
    zero_sums();
    for (int64_t w = 0; w < n_.widths; ++w)
      multiply_step(left_ + w * kBlockSize, keys_ + (j * n_.widths + w) * kBlockSize);
    store_sums(scores_[i & 1] + j * kSums);
  }

  void attend(int64_t b, int64_t h, int64_t i) {
    const int64_t count = smaller(kBlock, a_.queries - i * kBlock);
    const bool more = i + 1 < n_.queries;
    if (more) load_queries(b, h, i + 1);
    int64_t done = 0;
    for (int64_t j = 0; j < n_.keys; ++j) {
      if (more) score(i + 1, j);
      for (const int64_t end = count * (j + 1) / n_.keys; done < end; ++done) softmax(scores_[i & 1], done);
    }
    log_sum_exp(a_.lse + (b * a_.heads + h) * a_.queries + i * kBlock, count);
    for (int64_t w = 0; w < n_.widths; ++w) {
      zero_sums();
      done = 0;
      for (int64_t j = 0; j < n_.keys; ++j) {
        multiply_step(probabilities_ + j * kBlockSize, values_ + (w * n_.keys + j) * kBlockSize);
        if (w == 0) continue;
        const int64_t end = count * (j + 1) / n_.keys;
        finish(b, h, i, w - 1, done, end);
        done = end;
      }
      store_sums(sums_[w & 1]);
    }
    finish(b, h, i, n_.widths - 1, 0, count);
  }

  // Rows of a product with values, divided.
  FASTPEFT_INLINE void finish(int64_t b, int64_t h, int64_t i, int64_t w, int64_t begin, int64_t end) {
    store_pieces(a_.out, a_.dim, b, h, i * kBlock + begin, end - begin, w * kBlock, [&](int64_t r) {
      const Row s = sums_of(sums_[w & 1], begin + r);
      const __m512 factor = constant(factors_[begin + r]);
      return narrow(_mm512_mul_ps(s.low, factor), _mm512_mul_ps(s.high, factor));
    });
  }

  // From the largest scores and the denominators: their logarithms, and their reciprocals for the rows of the result.
  FASTPEFT_INLINE void log_sum_exp(float* lse, int64_t count) {
    for (int64_t r = 0; r < count; r += 16) {
      const __mmask16 mask = count - r >= 16 ? 0xffff : (1 << (count - r)) - 1;
      const __m512 total = _mm512_maskz_load_ps(mask, totals_ + r), top = _mm512_maskz_load_ps(mask, tops_ + r);
      _mm512_mask_storeu_ps(lse + r, mask, _mm512_fmadd_ps(top, constant(a_.scale), log(total)));
      _mm512_store_ps(factors_ + r, _mm512_div_ps(constant(1.0f), total));
    }
  }

  // Row r of scores to probabilities without their denominator.
  FASTPEFT_INLINE void softmax(const float* scores, int64_t r) {
    const int64_t whole = (a_.tokens + a_.prompts) / kBlock, rest = (a_.tokens + a_.prompts) % kBlock;
    const __mmask16 low = rest >= 16 ? 0xffff : (1 << rest) - 1, high = rest > 16 ? (1 << (rest - 16)) - 1 : 0;
    __m512 m = constant(-__builtin_inff()), m2 = m;
    for (int64_t j = 0; j < whole; ++j) {
      const Row s = sums_of(scores + j * kSums, r);
      m = _mm512_max_ps(m, s.low);
      m2 = _mm512_max_ps(m2, s.high);
    }
    if (rest > 0) {
      const Row s = sums_of(scores + whole * kSums, r);
      m = _mm512_mask_max_ps(m, low, m, s.low);
      m2 = _mm512_mask_max_ps(m2, high, m2, s.high);
    }
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(m, m2));
    const __m512 factor = constant(a_.scale * kLog2E), shift = constant(-top * a_.scale * kLog2E);
    __m512 sum = _mm512_setzero_ps(), sum2 = sum;
    for (int64_t j = 0; j < n_.keys; ++j) {
      const Row s = sums_of(scores + j * kSums, r);
      __m512 x = exp2(_mm512_fmadd_ps(s.low, factor, shift)), y = exp2(_mm512_fmadd_ps(s.high, factor, shift));
      if (j == whole) {
        x = _mm512_maskz_mov_ps(low, x);
        y = _mm512_maskz_mov_ps(high, y);
      }
      sum = _mm512_add_ps(sum, x);
      sum2 = _mm512_add_ps(sum2, y);
      _mm512_store_si512(probabilities_ + j * kBlockSize + r * kBlock, narrow(x, y));
    }
    tops_[r] = top;
    totals_[r] = _mm512_reduce_add_ps(_mm512_add_ps(sum, sum2));
  }

  const Attention& whole_;
  Attention a_;
  Extent n_;
  bf16 *keys_, *values_, *left_, *probabilities_;
  float *scores_[2], *sums_[2];  // of two blocks of queries, of two blocks of columns
  alignas(64) float tops_[kBlock], totals_[kBlock], factors_[kBlock];
};

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(attention_forward)(const fastpeft::Attention* attention) {
  using namespace fastpeft;
  const Attention& a = *attention;
  if (!lengths_fit(a)) return kOutOfRange;
  const int64_t items = a.batch * a.heads;
  const int threads = team(a.threads, items);
  bool enough = true;
  parallel(threads, [&](int index) {
    auto* memory = static_cast<bf16*>(scratch<ForwardTag>(Forward::blocks(a) * kBlockSize * 2));
    if (memory == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Tiles tiles;
    Forward forward(a, memory);
    const Range mine = part_of(items, threads, index);
    for (int64_t item = mine.begin; item < mine.end; ++item)
      forward.run(item % a.batch, item / a.batch, item == mine.begin || item % a.batch == 0);
  });
  return enough ? kOk : kNoMemory;
}
