// What the kernels take, in plain C++: between library.cpp, which knows torch, and the .cu files, which do not.
//
// Every function only starts work on the stream, and throws std::runtime_error where it cannot. What they are given has
// been checked.

#pragma once

#include <cstdint>

namespace fastpeft {

enum class Element { kBf16, kFp16 };

// A (batch, heads, rows, head dim) tensor of 16-bit elements with the last dimension contiguous. Strides in elements,
// multiples of 8, as the address is a multiple of 16 bytes; a stride of 0 repeats.
struct View {
  uint16_t* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

//   out = softmax(scale * q [k; prompt_k]^T) [v; prompt_v]
//
// causal: query i sees the tokens 0..i and every prompt. There is at least one key, and scale is positive.
struct Attention {
  Element element;
  int64_t batch;
  int heads, queries, tokens, prompts, head_dim;
  View q, k, v, prompt_k, prompt_v;
  float scale;
  bool causal;
};

// out: (batch, heads, queries, head dim); lse: (batch, heads, queries) contiguous, the logarithm of the sum of the
// exponentials.
void prompt_attention_forward(const Attention& a, View out, float* lse, void* stream);

struct AttentionGradients {
  View dout, out;
  const float* lse;
  // Null where nobody needs it. Gradients of prompts that the batch shares have a batch stride of 0.
  View dq, dk, dv, dprompt_k, dprompt_v;
  bool shared_prompts;
  // As many numbers as prompt_attention_workspace says.
  float* workspace;
  int processors;
};

// fp32 numbers that the backward pass needs beside its results.
int64_t prompt_attention_workspace(const Attention& a, const AttentionGradients& g);

void prompt_attention_backward(const Attention& a, const AttentionGradients& g, void* stream);

//   z = x down^T + down_bias,   h = act(z),   y = scale * (h up^T + up_bias) + residual
//
// x: (rows, width); down: (hidden, width); up: (width, hidden), both contiguous. width is a multiple of 8 and hidden is
// one up to 128. Strides of rows are in elements.
struct Adapter {
  Element element;
  int64_t rows;
  int width, hidden, activation;
  const uint16_t *x, *down, *down_bias, *up;  // down_bias: (hidden,) or null
  int64_t x_stride;
  float scale;
};

struct AdapterForward {
  const uint16_t *up_bias, *residual;  // (width,) or null; (rows, width) or null
  int64_t residual_stride;
  uint16_t* y;  // (rows, width) contiguous
};

void adapter_forward(const Adapter& a, const AdapterForward& f, void* stream);

//   dz = scale * (dy up) * act'(z),   dx = dz down + add
struct AdapterBackward {
  const uint16_t *dy, *add;  // (rows, width); add may be null
  int64_t dy_stride, add_stride;
  uint16_t *dx, *dz, *h;  // (rows, width), (rows, hidden) twice, contiguous; null where nobody needs it
};

void adapter_backward(const Adapter& a, const AdapterBackward& b, void* stream);

}  // namespace fastpeft
