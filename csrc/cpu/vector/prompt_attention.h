// out = softmax(scale * q [k; prompt_k]^T + bias) [v; prompt_v], and its gradients, in fp32 sums.
// fastpeft/native/vector/prompt_attention.py lays this out.

#pragma once

#include "product.h"

namespace fastpeft {
namespace {

// Rows of all heads of a batch: row i of head h of sample b begins at data + b * batch + h * head + i * row.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

struct Attention {
  int64_t batch, heads, queries, tokens, prompts, dim;
  Heads q, k, v, prompt_k, prompt_v;  // a batch distance of 0: prompts that the batch shares
  Heads out;
  float* lse;         // (batch, heads, queries), natural logarithm; -inf of a row that sees nothing
  const float* bias;  // on the tokens' scores, by four distances, the last 0 or 1; or null
  int64_t bias_batch, bias_head, bias_row, bias_column;
  const int32_t *row_words, *column_words;  // (batch, heads, queries) and (tokens + prompts,); or null
  int32_t threshold;                        // words below it are dropped
  float keep_scale, scale;
  int32_t causal, threads, half;
  // Backward. Data that is null is not needed.
  Heads dout, dq, dk, dv;
  // (parts, heads, prompts, dim): sums over a part of the batch each, a part being one sample where prompts are not shared
  float *dprompt_k, *dprompt_v;
  int64_t parts;
};

template <class T>
FASTPEFT_INLINE T* row_of(const Heads& m, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(m.data) + b * m.batch + h * m.head + i * m.row;
}

// Sizes of the parts of a head in memory, in numbers.
struct Extent {
  int64_t keys;       // tokens and prompts
  int64_t width;      // of a row of a head, in whole vectors
  int64_t line;       // of a row of scores, with room for products that take rows of keys by kFewer
  int64_t block;      // queries at a time
  int64_t panels;     // a right factor of `keys` rows
  int64_t transposed;  // a right factor of `keys` columns

  explicit Extent(const Attention& a) : keys(a.tokens + a.prompts), width(whole_vectors(a.dim)) {
    line = whole_vectors(keys + kFewer);
    // Rows whose distance is a large power of two fall into the same few places of a cache.
    if (line % 256 == 0) line += kWidth;
    block = line <= 2048 ? 48 : 24;
    panels = whole_panels(a.dim) * keys;
    transposed = whole_panels(keys) * a.dim;
  }
};

// Key i of a head, or value: tokens, then prompts; null behind them.
template <class T>
FASTPEFT_INLINE const T* key_row(const Attention& a, const Heads& tokens, const Heads& prompts, int64_t b, int64_t h,
                                 int64_t i) {
  if (i < a.tokens) return row_of<const T>(tokens, b, h, i);
  return i < a.tokens + a.prompts ? row_of<const T>(prompts, b, h, i - a.tokens) : nullptr;
}

// Keys or values from `first` on, a multiple of kPanel, as a right factor's columns.
template <class T>
FASTPEFT_INLINE void put_transposed(const Attention& a, const Heads& tokens, const Heads& prompts, int64_t b, int64_t h,
                                    int64_t first, float* out) {
  for (int64_t j = first; j < a.tokens + a.prompts; j += kWidth) {
    const T* rows[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) rows[i] = key_row<T>(a, tokens, prompts, b, h, j + i);
    put_columns(rows, a.dim, j, out);
  }
}

// Keys or values as a right factor's rows.
template <class T>
FASTPEFT_INLINE void put_plain(const Attention& a, const Heads& tokens, const Heads& prompts, int64_t b, int64_t h,
                               float* out) {
  const int64_t keys = a.tokens + a.prompts;
  for (int64_t j = 0; j < keys; ++j) put_panels(key_row<T>(a, tokens, prompts, b, h, j), a.dim, j, keys, out);
}

constexpr float kInfinity = __builtin_inff();

// What becomes of a row of scores.
class Row {
 public:
  Row(const Attention& a, int64_t b, int64_t h, int64_t i)
      : a_(a), i_(i), keys_(a.tokens + a.prompts) {
    if (a.bias) bias_ = a.bias + b * a.bias_batch + h * a.bias_head + i * a.bias_row;
    if (a.row_words) word_ = a.row_words[(b * a.heads + h) * a.queries + i];
  }

  // scale * s + bias of the keys from j on; -inf for what is not seen.
  FASTPEFT_INLINE Floats logits(Floats s, int64_t j) const {
    Floats x = s * a_.scale;
    if (bias_ && j < a_.tokens) {
      Floats bias = {};
      if (a_.bias_column == 0)
        bias = lanes() + static_cast<int32_t>(j) < static_cast<int32_t>(a_.tokens) ? all(*bias_) : bias;
      else
        bias = j + kWidth <= a_.tokens ? load(bias_ + j) : load(bias_ + j, Part{a_.tokens - j});
      x += bias;
    }
    const Ints key = lanes() + static_cast<int32_t>(j);
    if (a_.causal)
      x = (key <= static_cast<int32_t>(i_)) | (key >= static_cast<int32_t>(a_.tokens)) ? x : all(-kInfinity);
    if (j + kWidth > keys_) x = key < static_cast<int32_t>(keys_) ? x : all(-kInfinity);
    return x;
  }

  // 0 for the weights that dropout drops, of the keys from j on, and 1 / (1 - p) for the others. fastpeft/ops/dropout_mask.py
  // draws the same.
  FASTPEFT_INLINE Floats kept(int64_t j) const {
    if (a_.row_words == nullptr) return all(1.0f);
    Bits words = {};
    if (j + kWidth <= keys_)
      words = (Bits)*reinterpret_cast<const IntsAt*>(a_.column_words + j);
    else
      for (int64_t i = 0; j + i < keys_; ++i) words[i] = static_cast<uint32_t>(a_.column_words[j + i]);
    Bits z = (words ^ static_cast<uint32_t>(word_)) * 0x7FEB352Du;
    z = (z ^ (z >> 15)) * 0x846CA68Bu;
    z ^= z >> 16;
    return (Ints)z >= a_.threshold ? all(a_.keep_scale) : Floats{};
  }

 private:
  const Attention& a_;
  const int64_t i_, keys_;
  const float* bias_ = nullptr;
  int32_t word_ = 0;
};

// Calls body(j, k) for each vector of [first, end), with k going round 0 to 3.
template <class Body>
FASTPEFT_INLINE void over_keys(int64_t first, int64_t end, const Body& body) {
  int64_t j = first;
  for (; j + 4 * kWidth <= end; j += 4 * kWidth) {
    body(j, 0);
    body(j + kWidth, 1);
    body(j + 2 * kWidth, 2);
    body(j + 3 * kWidth, 3);
  }
  for (; j < end; j += kWidth) body(j, 0);
}

}  // namespace
}  // namespace fastpeft
