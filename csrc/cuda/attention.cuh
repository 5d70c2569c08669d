// What the forward and backward kernels of attention share: where the rows of keys are, which keys a query sees, and
// which tiles need a look at that.

#pragma once

#include "kernels.h"
#include "softmax.cuh"

namespace fastpeft {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

FASTPEFT_DEVICE int least(int a, int b) { return a < b ? a : b; }
FASTPEFT_DEVICE int most(int a, int b) { return a > b ? a : b; }

FASTPEFT_DEVICE uint16_t* head_of(const View& view, int64_t batch, int head) {
  return view.data + batch * view.batch + head * view.head;
}

// Rows of one head from `first` on; there are `count` of them.
struct HeadRows {
  uint16_t* data;
  int64_t stride;
  int first, count;

  FASTPEFT_DEVICE HeadRows(const View& view, int64_t batch, int head, int first, int count)
      : data(head_of(view, batch, head)), stride(view.row), first(first), count(count) {}

  FASTPEFT_DEVICE Row operator()(int r) const { return {data + (first + r) * stride, first + r < count}; }
};

// Keys (or values, or gradients of them) of one head: the tokens, then the prompts, counted together: those from
// `first` on, up to `last`.
struct KeyRows {
  uint16_t *token, *prompt;
  int64_t token_stride, prompt_stride;
  int tokens, first, last;

  FASTPEFT_DEVICE KeyRows(const View& token, const View& prompt, int64_t batch, int head, int tokens, int first, int last)
      : token(head_of(token, batch, head)),
        prompt(head_of(prompt, batch, head)),
        token_stride(token.row),
        prompt_stride(prompt.row),
        tokens(tokens),
        first(first),
        last(last) {}

  FASTPEFT_DEVICE Row operator()(int r) const {
    const int j = first + r;
    const bool is_token = j < tokens;
    const int64_t offset = (is_token ? j : j - tokens) * (is_token ? token_stride : prompt_stride);
    return {(is_token ? token : prompt) + offset, j < last};
  }
};

// Which keys a query sees. `keys` counts tokens and prompts.
struct Visibility {
  int tokens, keys;
  bool causal;

  FASTPEFT_DEVICE bool sees(int query, int key) const {
    return key < keys && (!causal || key <= query || key >= tokens);
  }
  // Queries [query, query_end) and keys [key, key_end): whether some pair is hidden.
  FASTPEFT_DEVICE bool hides_some(int query, int key, int key_end) const {
    return key_end > keys || (causal && key < tokens && least(key_end, tokens) - 1 > query);
  }
  // Whether every pair is hidden by the causal order.
  FASTPEFT_DEVICE bool hides_all(int query_end, int key, int key_end) const {
    return causal && key_end <= tokens && key >= query_end;
  }
};

// The tiles of SIZE keys that some query before `query_end` sees: the first ones, and under a causal mask those with
// prompts behind the tokens that are hidden.
template <int SIZE>
struct KeyTiles {
  int before, resume, count;

  FASTPEFT_DEVICE KeyTiles(const Visibility& v, int query_end) {
    const int all = (v.keys + SIZE - 1) / SIZE;
    before = resume = all;
    if (v.causal && query_end < v.tokens) {
      before = (query_end + SIZE - 1) / SIZE;
      resume = v.keys > v.tokens ? most(before, v.tokens / SIZE) : all;
    }
    count = before + (all - resume);
  }

  // First key of the i-th of these tiles.
  FASTPEFT_DEVICE int operator()(int i) const { return (i < before ? i : resume + (i - before)) * SIZE; }
};

}  // namespace fastpeft
