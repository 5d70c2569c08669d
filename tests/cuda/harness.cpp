// The kernels' host functions, run by the emulator, with an interface for ctypes: tests/cuda/emulation.py.
//
// A function returns 0, or 1 and leaves what went wrong in `message`.

#include "kernels.h"

#include <cstdio>

#include "primitives.cuh"

namespace {

using namespace fastpeft;

char message[512];

// Mirrored in emulation.py.
struct Tensor {
  void* data;
  int64_t strides[3];
};

View view(const Tensor& t) { return {static_cast<uint16_t*>(t.data), t.strides[0], t.strides[1], t.strides[2]}; }
uint16_t* pointer(const Tensor& t) { return static_cast<uint16_t*>(t.data); }

template <class Work>
int reported(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return 1;
  }
}

struct AttentionCall {
  int32_t element, heads, queries, tokens, prompts, head_dim, causal, shared_prompts, processors;
  float scale;
  int64_t batch;
  Tensor q, k, v, prompt_k, prompt_v, out, dout, dq, dk, dv, dprompt_k, dprompt_v;
  float *lse, *workspace;
};

Attention attention(const AttentionCall& c) {
  return {static_cast<Element>(c.element), c.batch,   c.heads,          c.queries,        c.tokens, c.prompts, c.head_dim,
          view(c.q),                       view(c.k), view(c.v),        view(c.prompt_k), view(c.prompt_v),
          c.scale,                         c.causal != 0};
}

AttentionGradients gradients(const AttentionCall& c) {
  return {view(c.dout),     view(c.out),       c.lse,          view(c.dq),  view(c.dk), view(c.dv), view(c.dprompt_k),
          view(c.dprompt_v), c.shared_prompts != 0, c.workspace, c.processors};
}

struct AdapterCall {
  int32_t element, width, hidden, activation;
  float scale;
  int64_t rows;
  Tensor x, down, down_bias, up, up_bias, residual, y, dy, dx, dz, h;
};

Adapter adapter(const AdapterCall& c) {
  return {static_cast<Element>(c.element),
          c.rows,
          c.width,
          c.hidden,
          c.activation,
          pointer(c.x),
          pointer(c.down),
          pointer(c.down_bias),
          pointer(c.up),
          c.x.strides[0],
          c.scale};
}

}  // namespace

extern "C" {

const char* emulate_message() { return message; }

void emulate_seed(uint64_t seed) { emulator::seed = seed; }

int64_t emulate_conflicts() {
  const int64_t found = emulator::conflicts;
  emulator::conflicts = 0;
  return found;
}

void emulate_forget() {
  emulator::ranges.clear();
  emulator::shared_of_launches.clear();
}

// Shared memory of a launch since the last emulate_forget, in bytes, or -1 behind the last.
int emulate_shared(int launch) {
  const auto& all = emulator::shared_of_launches;
  return launch < static_cast<int>(all.size()) ? all[launch] : -1;
}

void emulate_announce(const char* begin, int64_t bytes, int writable) {
  emulator::ranges.push_back({begin, begin + bytes, writable != 0, {}});
}

int emulate_attention_forward(const AttentionCall* c) {
  return reported([&] { prompt_attention_forward(attention(*c), view(c->out), c->lse, nullptr); });
}

int64_t emulate_attention_workspace(const AttentionCall* c) {
  return prompt_attention_workspace(attention(*c), gradients(*c));
}

int emulate_attention_backward(const AttentionCall* c) {
  return reported([&] { prompt_attention_backward(attention(*c), gradients(*c), nullptr); });
}

int emulate_adapter_forward(const AdapterCall* c) {
  return reported([&] {
    adapter_forward(adapter(*c), {pointer(c->up_bias), pointer(c->residual), c->residual.strides[0], pointer(c->y)},
                    nullptr);
  });
}

int emulate_adapter_backward(const AdapterCall* c) {
  return reported([&] {
    adapter_backward(adapter(*c),
                     {pointer(c->dy), pointer(c->residual), c->dy.strides[0], c->residual.strides[0], pointer(c->dx),
                      pointer(c->dz), pointer(c->h)},
                     nullptr);
  });
}

}  // extern "C"
