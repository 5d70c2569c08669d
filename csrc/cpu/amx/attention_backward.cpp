// Gradients of attention, a head of a sample at a time, 32 keys at a time, on transposed scores:
//
//   P^T = exp(scale * k q^T - lse),   dP^T = v dout^T,   dS^T = scale * P^T * (dP^T - delta)
//   dv = P^T dout,   dk = dS^T q,   dq^T = k^T dS^T,   delta = sum over keys of P dP / sum over keys of P
//
// Where dk and dv are one place, as of keys and values that are one tensor, it gets their sum.
//
// Transposed, P and dS come out as the left factors of dv and dk; pairs of rows of dS^T interleaved are the right factor
// of dq^T. No matrix of probabilities is ever transposed.
//
// delta is also rowsum(dout * out), which needs no pass over the keys. But out is rounded: where keys have much in common,
// the rows of dS then do not sum to zero, and dq is off by that sum times what the keys have in common. Summed over the
// very probabilities that it is multiplied by, delta leaves nothing; and nobody has to keep out.

#include "attention.h"
#include "epilogues.h"

namespace fastpeft {
namespace {

struct BackwardTag;

// Tensors in a blocked matrix have its address in common, and not their columns.
bool one_place(const Heads& a, const Heads& b) {
  return a.data == b.data && a.layout == b.layout && a.batch == b.batch && a.head == b.head && a.row == b.row;
}

class Backward {
 public:
  Backward(const Attention& a, bf16* memory) : whole_(a), a_(a), n_(a), first_(first(a)) {
    queries_ = take(memory, n_.queries * n_.widths);
    queries_depth_ = take(memory, n_.queries * n_.widths);
    douts_ = take(memory, n_.queries * n_.widths);
    douts_depth_ = take(memory, n_.queries * n_.widths);
    key_rows_ = take(memory, n_.widths);
    one_memory_ = a.prompts == 0 && one_place(a.k, a.v);
    value_rows_ = one_memory_ ? key_rows_ : take(memory, n_.widths);
    keys_transposed_ = take(memory, n_.widths * n_.keys);
    probabilities_ = take(memory, n_.queries * n_.keys);
    dprobabilities_ = reinterpret_cast<float*>(take(memory, 2 * n_.queries * n_.keys));
    slopes_ = take(memory, n_.queries);
    slopes_depth_ = take(memory, n_.queries * n_.keys);
    sums_ = reinterpret_cast<float*>(take(memory, 16));
    lse_ = reinterpret_cast<float*>(take(memory, ceil_div<int64_t>(n_.queries, 8)));
    delta_ = reinterpret_cast<float*>(take(memory, ceil_div<int64_t>(n_.queries, 8)));
    total_ = reinterpret_cast<float*>(take(memory, ceil_div<int64_t>(n_.queries, 8)));
  }

  // Only the prompts' gradients are needed: their blocks are enough.
  static int64_t first(const Attention& a) {
    return a.dq.data == nullptr && a.dk.data == nullptr && a.dv.data == nullptr ? a.tokens / kBlock : 0;
  }

  static int64_t blocks(const Attention& a) {
    const Extent n(a);
    return 4 * n.queries * n.widths + 2 * n.widths + n.widths * n.keys + n.queries + 4 * n.queries * n.keys + 16 +
           3 * ceil_div<int64_t>(n.queries, 8);
  }

  // k_sums, v_sums: (prompts, dim) of prompts that the batch shares, added to; or null.
  void run(int64_t b, int64_t h, float* k_sums, float* v_sums) {
    if (whole_.lengths != nullptr) {
      a_ = of_sample(whole_, b);
      n_ = Extent(a_);
      first_ = first(a_);
      nothing(a_.dk, b, h);
      nothing(a_.dv, b, h);
    }
    const bool both = a_.dk.data != nullptr && one_place(a_.dk, a_.dv);
    const bool needs_dk = a_.dk.data != nullptr || a_.dprompt_k.data != nullptr || k_sums != nullptr;
    const bool needs_dv = a_.dv.data != nullptr || a_.dprompt_v.data != nullptr || v_sums != nullptr;
    pack_queries(b, h);
    for (int64_t j = 0; j < n_.keys; ++j) probabilities(b, h, j);
    for (int64_t i = 0; i < n_.queries * kBlock; i += 16)
      _mm512_store_ps(delta_ + i, _mm512_div_ps(_mm512_load_ps(delta_ + i), _mm512_load_ps(total_ + i)));
    for (int64_t j = first_; j < n_.keys; ++j) {
      const Product dv = {probabilities_ + j * n_.queries * kBlockSize, douts_depth_}, dk = {slopes_, queries_depth_};
      if (needs_dk || a_.dq.data != nullptr) slopes(j);
      if (needs_dv) gradient(b, h, j, dv, both ? dk : kNothing, a_.dv, a_.dprompt_v, v_sums);
      if (needs_dk && !both) gradient(b, h, j, dk, kNothing, a_.dk, a_.dprompt_k, k_sums);
    }
    if (a_.dq.data != nullptr) query_gradient(b, h);
  }

 private:
  void pack_queries(int64_t b, int64_t h) {
    const Source q = {&a_.q, nullptr, a_.dim, b, h, a_.queries, 0};
    const Source g = {&a_.dout, nullptr, a_.dim, b, h, a_.queries, 0};
    __m512i rows[kBlock];
    for (int64_t i = 0; i < n_.queries; ++i) {
      for (int64_t w = 0; w < n_.widths; ++w) {
        q.rows(i, w * kBlock, rows);
        put_right_transposed(rows, queries_ + (i * n_.widths + w) * kBlockSize);
        put_right(rows, queries_depth_ + (w * n_.queries + i) * kBlockSize);
        g.rows(i, w * kBlock, rows);
        put_right_transposed(rows, douts_ + (i * n_.widths + w) * kBlockSize);
        put_right(rows, douts_depth_ + (w * n_.queries + i) * kBlockSize);
      }
      for (int64_t r = i * kBlock; r < (i + 1) * kBlock; ++r) {
        // What stands for a query that there is not: probabilities of zero, and no division by their sum.
        const bool there = r < a_.queries;
        lse_[r] = there ? kLog2E * a_.lse[(b * a_.heads + h) * a_.queries + r] : 1e30f;
        delta_[r] = 0.0f;
        total_[r] = there ? 0.0f : 1.0f;
      }
    }
  }

  // Probabilities of 32 keys for all queries, and their gradients, which stay in fp32.
  void probabilities(int64_t b, int64_t h, int64_t j) {
    const Source k = {&a_.k, &a_.prompt_k, a_.dim, b, h, a_.tokens, a_.prompts};
    const Source v = {&a_.v, &a_.prompt_v, a_.dim, b, h, a_.tokens, a_.prompts};
    __m512i rows[kBlock];
    for (int64_t w = 0; w < n_.widths; ++w) {
      k.rows(j, w * kBlock, rows);
      put_left(rows, key_rows_ + w * kBlockSize);
      if (a_.dq.data != nullptr) put_left_transposed(rows, keys_transposed_ + (w * n_.keys + j) * kBlockSize);
      if (one_memory_) continue;
      v.rows(j, w * kBlock, rows);
      put_left(rows, value_rows_ + w * kBlockSize);
    }
    const int64_t count = smaller(kBlock, a_.tokens + a_.prompts - j * kBlock);
    const __m512 factor = constant(a_.scale * kLog2E);
    multiply_scores(j, 0);
    for (int64_t i = 0; i < n_.queries; ++i) {
      // The matrix unit is ahead by one block of queries.
      if (i + 1 < n_.queries) multiply_scores(j, i + 1);
      const float* s = sums_ + (i & 1) * kSums;
      const float* dp = dprobabilities_ + (j * n_.queries + i) * kSums;
      bf16* p = probabilities_ + (j * n_.queries + i) * kBlockSize;
      float *delta = delta_ + i * kBlock, *total = total_ + i * kBlock;
      const __m512 lse[2] = {_mm512_load_ps(lse_ + i * kBlock), _mm512_load_ps(lse_ + i * kBlock + 16)};
      __m512 sum[2] = {_mm512_load_ps(total), _mm512_load_ps(total + 16)};
      __m512 dot[2] = {_mm512_load_ps(delta), _mm512_load_ps(delta + 16)};
      for (int64_t r = 0; r < count; ++r) {
        const Row score = sums_of(s, r), slope = sums_of(dp, r);
        const __m512i both =
            narrow(exp2(_mm512_fmsub_ps(score.low, factor, lse[0])), exp2(_mm512_fmsub_ps(score.high, factor, lse[1])));
        _mm512_store_si512(p + r * kBlock, both);
        const __m512 x = low_half(both), y = high_half(both);
        sum[0] = _mm512_add_ps(sum[0], x);
        sum[1] = _mm512_add_ps(sum[1], y);
        dot[0] = _mm512_fmadd_ps(x, slope.low, dot[0]);
        dot[1] = _mm512_fmadd_ps(y, slope.high, dot[1]);
      }
      // A key behind the last has scores of zero, whose exponential may be anything.
      for (int64_t r = count; r < kBlock; ++r) _mm512_store_si512(p + r * kBlock, _mm512_setzero_si512());
      _mm512_store_ps(total, sum[0]);
      _mm512_store_ps(total + 16, sum[1]);
      _mm512_store_ps(delta, dot[0]);
      _mm512_store_ps(delta + 16, dot[1]);
    }
  }

  FASTPEFT_INLINE void multiply_scores(int64_t j, int64_t i) {
    zero_sums();
    for (int64_t w = 0; w < n_.widths; ++w)
      multiply_step(key_rows_ + w * kBlockSize, queries_ + (i * n_.widths + w) * kBlockSize);
    store_sums(sums_ + (i & 1) * kSums);
    zero_sums();
    for (int64_t w = 0; w < n_.widths; ++w)
      multiply_step(value_rows_ + w * kBlockSize, douts_ + (i * n_.widths + w) * kBlockSize);
    store_sums(dprobabilities_ + (j * n_.queries + i) * kSums);
  }

  // dS^T of 32 keys for all queries, as the left factor of dk and as the right factor of dq^T.
  void slopes(int64_t j) {
    const __m512 scale = constant(a_.scale);
    for (int64_t i = 0; i < n_.queries; ++i) {
      const float* dp = dprobabilities_ + (j * n_.queries + i) * kSums;
      const bf16* p = probabilities_ + (j * n_.queries + i) * kBlockSize;
      bf16* ds = slopes_ + i * kBlockSize;
      bf16* depth = slopes_depth_ + (i * n_.keys + j) * kBlockSize;
      const __m512 delta[2] = {_mm512_load_ps(delta_ + i * kBlock), _mm512_load_ps(delta_ + i * kBlock + 16)};
      for (int64_t r = 0; r < kBlock; r += 2) {
        __m512i row[2];
        for (int64_t e = 0; e < 2; ++e) {
          const Row slope = sums_of(dp, r + e);
          const __m512i both = _mm512_load_si512(p + (r + e) * kBlock);
          const __m512 x = _mm512_mul_ps(low_half(both), scale), y = _mm512_mul_ps(high_half(both), scale);
          row[e] = narrow(_mm512_mul_ps(x, _mm512_sub_ps(slope.low, delta[0])),
                          _mm512_mul_ps(y, _mm512_sub_ps(slope.high, delta[1])));
          _mm512_store_si512(ds + (r + e) * kBlock, row[e]);
        }
        if (a_.dq.data == nullptr) continue;
        __m512i first, second;
        interleave(row[0], row[1], &first, &second);
        _mm512_store_si512(depth + r * 16, first);
        _mm512_store_si512(depth + 512 + r * 16, second);
      }
    }
  }

  // Blocks of queries: those of the left factor one after another, those of the right one in rows of blocks.
  struct Product {
    const bf16 *left, *right;
  };
  static constexpr Product kNothing = {nullptr, nullptr};

  FASTPEFT_INLINE void multiply(const Product& product, int64_t w) {
    for (int64_t i = 0; i < n_.queries; ++i)
      multiply_step(product.left + i * kBlockSize, product.right + (w * n_.queries + i) * kBlockSize);
  }

  // Rows 32 j .. of a product, or of the sum of two, to tokens and prompts.
  void gradient(int64_t b, int64_t h, int64_t j, const Product& product, const Product& more, const Heads& tokens,
                const Heads& prompts, float* prompt_sums) {
    const int64_t count = smaller(kBlock, a_.tokens + a_.prompts - j * kBlock);
    for (int64_t w = 0; w < n_.widths; ++w) {
      zero_sums();
      multiply(product, w);
      if (more.left != nullptr) multiply(more, w);
      float* sums = sums_ + (4 + (w & 1)) * kSums;
      store_sums(sums);
      const int64_t column = w * kBlock, row = j * kBlock, own = row < a_.tokens ? smaller(count, a_.tokens - row) : 0;
      const auto narrowed = [&](int64_t r) {
        const Row s = sums_of(sums, r);
        return narrow(s.low, s.high);
      };
      if (tokens.data != nullptr) store_pieces(tokens, a_.dim, b, h, row, own, column, narrowed);
      for (int64_t r = own; r < count; ++r) {
        const int64_t prompt = row + r - a_.tokens;
        if (prompts.data != nullptr) {
          store_piece(prompts, a_.dim, b, h, prompt, column, narrowed(r));
        } else if (prompt_sums != nullptr) {
          const Row s = sums_of(sums, r);
          add(prompt_sums + prompt * a_.dim + column, a_.dim - column, s.low);
          add(prompt_sums + prompt * a_.dim + column + 16, a_.dim - column - 16, s.high);
        }
      }
    }
  }

  FASTPEFT_INLINE void add(float* to, int64_t count, __m512 x) {
    if (count <= 0) return;
    const __mmask16 mask = count >= 16 ? 0xffff : (1 << count) - 1;
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), x));
  }

  void query_gradient(int64_t b, int64_t h) {
    for (int64_t i = 0; i < n_.queries; ++i)
      for (int64_t w = 0; w < n_.widths; ++w) {
        zero_sums();
        for (int64_t j = 0; j < n_.keys; ++j)
          multiply_step(keys_transposed_ + (w * n_.keys + j) * kBlockSize, slopes_depth_ + (i * n_.keys + j) * kBlockSize);
        float* sums = sums_ + (6 + (w & 1)) * kSums;
        store_sums(sums);
        // Tiles: top left is columns 0..15 by queries 0..15, top right queries 16..31.
        for (int64_t half = 0; half < 2; ++half) {
          __m512i low[16], high[16];
          for (int64_t r = 0; r < 16; ++r) {
            low[r] = _mm512_load_si512(sums + half * 256 + r * 16);
            high[r] = _mm512_load_si512(sums + 512 + half * 256 + r * 16);
          }
          transpose(low);
          transpose(high);
          const int64_t row = i * kBlock + half * 16;
          if (row < a_.queries)
            store_pieces(a_.dq, a_.dim, b, h, row, smaller<int64_t>(16, a_.queries - row), w * kBlock, [&](int64_t r) {
              return narrow(_mm512_castsi512_ps(low[r]), _mm512_castsi512_ps(high[r]));
            });
        }
      }
  }

  // Zeros for the tokens that the sample does not see.
  void nothing(const Heads& to, int64_t b, int64_t h) {
    if (to.data == nullptr) return;
    for (int64_t i = a_.tokens; i < whole_.tokens; ++i)
      for (int64_t w = 0; w < n_.widths; ++w) store_piece(to, a_.dim, b, h, i, w * kBlock, _mm512_setzero_si512());
  }

  const Attention& whole_;
  Attention a_;
  Extent n_;
  int64_t first_;    // block of keys to begin with
  bool one_memory_;  // values are the keys
  bf16 *queries_, *queries_depth_, *douts_, *douts_depth_, *key_rows_, *value_rows_, *keys_transposed_, *probabilities_,
      *slopes_, *slopes_depth_;
  float *sums_, *dprobabilities_, *lse_, *delta_, *total_;
};

}  // namespace
}  // namespace fastpeft

// prompt_k_sums and prompt_v_sums are zero when this is called.
FASTPEFT_EXPORT int32_t FASTPEFT_NAME(attention_backward)(const fastpeft::Attention* attention) {
  using namespace fastpeft;
  const Attention& a = *attention;
  if (!lengths_fit(a)) return kOutOfRange;
  // Without sums over the batch every sample is a part of its own.
  const bool sums = a.prompt_k_sums != nullptr || a.prompt_v_sums != nullptr;
  const int64_t parts = sums ? a.parts : a.batch, groups = parts * a.heads;
  const int threads = team(a.threads, groups);
  bool enough = true;
  parallel(threads, [&](int index) {
    auto* memory = static_cast<bf16*>(scratch<BackwardTag>(Backward::blocks(a) * kBlockSize * 2));
    if (memory == nullptr) {
      __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      return;
    }
    const Tiles tiles;
    Backward backward(a, memory);
    const Range mine = part_of(groups, threads, index);
    for (int64_t group = mine.begin; group < mine.end; ++group) {
      const int64_t part = group % parts, h = group / parts, at = (part * a.heads + h) * a.prompts * a.dim;
      const Range samples = part_of(a.batch, parts, part);
      float* k_sums = a.prompt_k_sums == nullptr ? nullptr : a.prompt_k_sums + at;
      float* v_sums = a.prompt_v_sums == nullptr ? nullptr : a.prompt_v_sums + at;
      for (int64_t b = samples.begin; b < samples.end; ++b) backward.run(b, h, k_sums, v_sums);
    }
  });
  return enough ? kOk : kNoMemory;
}
