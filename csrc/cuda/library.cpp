// The operators as torch sees them: schemas, checks, allocation, the stream. Against torch's stable ABI, so that one
// library serves several versions of torch and any version of Python.
//
// Nothing here needs a GPU until an operator is called: the library loads, and its schemas are there, under a torch
// without CUDA too.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

#ifdef FASTPEFT_EMULATE
#include "emulated_device.h"
#else
#include "device.h"
#endif

#define FASTPEFT_EXPORT extern "C" __attribute__((visibility("default")))

// Counts changes of the operators' interface. fastpeft/_cuda.py refuses a library of another count.
FASTPEFT_EXPORT int32_t fastpeft_cuda_interface() { return 1; }

// Compute capabilities that the kernels were compiled for, such as "8.0 9.0a 10.0"; PTX is there of the last one without
// a letter.
FASTPEFT_EXPORT const char* fastpeft_cuda_architectures() { return FASTPEFT_ARCHITECTURES; }

namespace {

using fastpeft::current_stream;
using fastpeft::DeviceGuard;
using fastpeft::Element;
using fastpeft::processors_of;
using fastpeft::View;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kWho = "fastpeft_cuda: ";

// Rows are counted in 32 bits, with room for a tile behind the last.
constexpr int64_t kMostRows = int64_t{1} << 30;

// ---- Checks ----

std::string text(IntHeaderOnlyArrayRef values) {
  std::string joined = "(";
  for (size_t i = 0; i < values.size(); ++i) joined += (i ? ", " : "") + std::to_string(values[i]);
  return joined + ")";
}

bool equal(IntHeaderOnlyArrayRef a, const Sizes& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < b.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// Of the shape and dtype, on the device of `like`.
void check_form(const char* name, const Tensor& t, const Sizes& shape, const Tensor& like, ScalarType dtype) {
  STD_TORCH_CHECK(equal(t.sizes(), shape), kWho, name, " has shape ", text(t.sizes()), ", expected ", text(shape));
  STD_TORCH_CHECK(fastpeft::is_on_device(t) && t.get_device_index() == like.get_device_index(), kWho, name,
                  " is not on the GPU of the first argument");
  STD_TORCH_CHECK(t.scalar_type() == dtype, kWho, name, " has another dtype than expected: give all tensors one dtype, ",
                  "bfloat16 or float16 (lse: float32)");
}

// The same, with rows that are contiguous and start at multiples of 16 bytes.
void check_tensor(const char* name, const Tensor& t, const Sizes& shape, const Tensor& like, ScalarType dtype) {
  check_form(name, t, shape, like, dtype);
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) == 1 || t.stride(last) == 1, kWho, "the last dimension of ", name,
                  " is not contiguous: call .contiguous() on it");
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < last; ++d) aligned = aligned && (t.size(d) == 1 || t.stride(d) % 8 == 0);
  STD_TORCH_CHECK(aligned, kWho, "rows of ", name, " do not start at multiples of 16 bytes (strides ", text(t.strides()),
                  "): call .clone(memory_format=torch.contiguous_format) on it");
}

ScalarType dtype_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kWho,
                  "the first argument must be bfloat16 or float16");
  return dtype;
}

Element element_of(ScalarType dtype) { return dtype == ScalarType::BFloat16 ? Element::kBf16 : Element::kFp16; }

uint16_t* pointer(const Tensor& t) { return static_cast<uint16_t*>(t.data_ptr()); }

// A dimension of one element may have any stride, which nobody should multiply with.
int64_t stride(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

// (batch, heads, rows, head dim), or (heads, rows, head dim) that the batch shares.
View view(const Tensor& t) {
  const int64_t d = t.dim();
  return {pointer(t), d == 4 ? stride(t, 0) : 0, stride(t, d - 3), stride(t, d - 2)};
}

// ---- Allocation ----

Tensor empty(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(like),
                                    from(IntHeaderOnlyArrayRef(sizes.data(), sizes.size())),
                                    from(IntHeaderOnlyArrayRef(strides.data(), strides.size())),
                                    from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return empty(like, sizes, strides, dtype);
}

// A tensor of this shape, (..., heads, rows, head dim), that lies in memory as (..., rows, heads, head dim): merging the
// heads of it is a view.
Tensor empty_by_rows(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  const size_t d = sizes.size();
  Sizes strides(d, 1);
  strides[d - 3] = sizes[d - 1];
  strides[d - 2] = sizes[d - 1] * sizes[d - 3];
  if (d == 4) strides[0] = strides[d - 2] * sizes[d - 2];
  return empty(like, sizes, strides, dtype);
}

// ---- Attention ----

Sizes shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.data(), sizes.data() + sizes.size());
}

// Checks the inputs of attention and gathers them.
fastpeft::Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& prompt_k,
                              const OptionalTensor& prompt_v, double scale, bool causal) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, kWho, "q and k must be (batch, heads, rows, head dim), given ",
                  text(q.sizes()), " and ", text(k.sizes()));
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3), tokens = k.size(2);
  const ScalarType dtype = dtype_of(q);
  STD_TORCH_CHECK(head_dim == 32 || head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128, kWho,
                  "the head dim must be 32, 64, 80, 96 or 128, given ", head_dim);
  STD_TORCH_CHECK(scale > 0.0, kWho, "the scale must be positive, given ", scale);
  STD_TORCH_CHECK(q.numel() > 0, kWho, "there is no query: q has shape ", text(q.sizes()));
  check_tensor("q", q, {batch, heads, queries, head_dim}, q, dtype);
  check_tensor("k", k, {batch, heads, tokens, head_dim}, q, dtype);
  check_tensor("v", v, {batch, heads, tokens, head_dim}, q, dtype);
  STD_TORCH_CHECK(prompt_k.has_value() == prompt_v.has_value(), kWho, "prompt_k and prompt_v go together: give both or none");
  int64_t prompts = 0;
  if (prompt_k.has_value()) {
    const int64_t d = prompt_k->dim();
    STD_TORCH_CHECK(d == 3 || d == 4, kWho, "prompt_k must be (heads, p, head dim) or (batch, heads, p, head dim), given ",
                    text(prompt_k->sizes()));
    prompts = prompt_k->size(d - 2);
    const Sizes shape = d == 3 ? Sizes{heads, prompts, head_dim} : Sizes{batch, heads, prompts, head_dim};
    check_tensor("prompt_k", *prompt_k, shape, q, dtype);
    check_tensor("prompt_v", *prompt_v, shape, q, dtype);
  }
  STD_TORCH_CHECK(tokens + prompts > 0, kWho, "there is no key: neither a token nor a prompt");
  STD_TORCH_CHECK(queries <= kMostRows && tokens + prompts <= kMostRows && heads <= kMostRows, kWho, "more than ",
                  kMostRows, " rows or heads");
  fastpeft::Attention a{};
  a.element = element_of(dtype);
  a.batch = batch;
  a.heads = static_cast<int>(heads);
  a.queries = static_cast<int>(queries);
  a.tokens = static_cast<int>(tokens);
  a.prompts = static_cast<int>(prompts);
  a.head_dim = static_cast<int>(head_dim);
  a.q = view(q), a.k = view(k), a.v = view(v);
  if (prompts > 0) a.prompt_k = view(*prompt_k), a.prompt_v = view(*prompt_v);
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  return a;
}

std::tuple<Tensor, Tensor> prompt_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const OptionalTensor& prompt_k, const OptionalTensor& prompt_v,
                                                    double scale, bool causal) {
  const fastpeft::Attention a = attention(q, k, v, prompt_k, prompt_v, scale, causal);
  const Tensor out = empty_by_rows(q, shape_of(q), q.scalar_type());
  const Tensor lse = empty(q, {a.batch, a.heads, a.queries}, ScalarType::Float);
  const DeviceGuard guard(q.get_device_index());
  fastpeft::prompt_attention_forward(a, view(out), static_cast<float*>(lse.data_ptr()),
                                     current_stream(q.get_device_index()));
  return {out, lse};
}

// Bits of `needs`, which fastpeft/ops/cuda_attention.py sets.
enum Need : int64_t { kQ = 1, kK = 2, kV = 4, kPromptK = 8, kPromptV = 16 };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& prompt_k,
    const OptionalTensor& prompt_v, const Tensor& out, const Tensor& lse, double scale, bool causal, int64_t needs,
    const OptionalTensor& packed) {
  const fastpeft::Attention a = attention(q, k, v, prompt_k, prompt_v, scale, causal);
  const ScalarType dtype = q.scalar_type();
  check_tensor("dout", dout, shape_of(q), q, dtype);
  check_tensor("out", out, shape_of(q), q, dtype);
  check_form("lse", lse, {a.batch, a.heads, a.queries}, q, ScalarType::Float);
  STD_TORCH_CHECK(lse.is_contiguous(), kWho, "lse must be contiguous, as the forward pass gave it");
  STD_TORCH_CHECK(!(needs & (kPromptK | kPromptV)) || prompt_k.has_value(), kWho,
                  "gradients of prompts are asked for, and there are no prompts");

  // What nobody needs is an empty tensor, as is what goes into `packed`; what has no rows needs no work.
  const auto gradient = [&](const Tensor& of, bool needed) {
    return needed ? empty_by_rows(q, shape_of(of), dtype) : empty(q, {0}, dtype);
  };
  const auto target = [](const Tensor& t) { return t.numel() > 0 ? view(t) : View{}; };
  const bool apart = !packed.has_value();
  const Tensor dq = gradient(q, apart && needs & kQ), dk = gradient(k, apart && needs & kK);
  const Tensor dv = gradient(v, apart && needs & kV);
  const Tensor dprompt_k = gradient(prompt_k.value_or(q), needs & kPromptK);
  const Tensor dprompt_v = gradient(prompt_v.value_or(q), needs & kPromptV);

  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  fastpeft::AttentionGradients g{};
  g.dout = view(dout), g.out = view(out);
  g.lse = static_cast<const float*>(lse.data_ptr());
  g.dq = target(dq), g.dk = target(dk), g.dv = target(dv);
  if (!apart) {
    check_tensor("packed", *packed, {a.batch, a.tokens, 3, a.heads, a.head_dim}, q, dtype);
    STD_TORCH_CHECK(a.queries == a.tokens && packed->is_contiguous(), kWho,
                    "packed must be contiguous, and there must be as many queries as tokens");
    const int64_t row = int64_t{a.heads} * a.head_dim;
    const auto part = [&](int i, bool needed) {
      return needed ? View{pointer(*packed) + i * row, 3 * row * a.tokens, a.head_dim, 3 * row} : View{};
    };
    g.dq = part(0, needs & kQ), g.dk = part(1, needs & kK), g.dv = part(2, needs & kV);
  }
  g.dprompt_k = target(dprompt_k), g.dprompt_v = target(dprompt_v);
  g.shared_prompts = prompt_k.has_value() && prompt_k->dim() == 3;
  g.processors = processors_of(device);
  if (needs & (kQ | kK | kV | kPromptK | kPromptV)) {
    const Tensor workspace = empty(q, {fastpeft::prompt_attention_workspace(a, g)}, ScalarType::Float);
    g.workspace = static_cast<float*>(workspace.data_ptr());
    fastpeft::prompt_attention_backward(a, g, current_stream(device));
  }
  return {dq, dk, dv, dprompt_k, dprompt_v};
}

// ---- Adapter ----

const uint16_t* pointer(const OptionalTensor& t) { return t.has_value() ? pointer(*t) : nullptr; }

int64_t row_stride(const OptionalTensor& t) { return t.has_value() ? stride(*t, 0) : 0; }

fastpeft::Adapter adapter(const Tensor& x, const Tensor& down_weight, const OptionalTensor& down_bias,
                          const Tensor& up_weight, int64_t activation, double scale) {
  STD_TORCH_CHECK(x.dim() == 2 && down_weight.dim() == 2, kWho, "x must be (rows, width) and down_weight (hidden, width), ",
                  "given ", text(x.sizes()), " and ", text(down_weight.sizes()));
  const ScalarType dtype = dtype_of(x);
  const int64_t rows = x.size(0), width = x.size(1), hidden = down_weight.size(0);
  STD_TORCH_CHECK(rows > 0, kWho, "x has no rows");
  STD_TORCH_CHECK(hidden >= 8 && hidden <= 128 && hidden % 8 == 0, kWho,
                  "the hidden width must be a multiple of 8 from 8 to 128, given ", hidden, ": pad the weights with zeros");
  STD_TORCH_CHECK(width >= 8 && width <= kMostRows && width % 8 == 0, kWho, "the width must be a multiple of 8, given ",
                  width);
  STD_TORCH_CHECK(activation >= 0 && activation <= 5, kWho, "there is no activation of code ", activation);
  check_tensor("x", x, {rows, width}, x, dtype);
  check_tensor("down_weight", down_weight, {hidden, width}, x, dtype);
  check_tensor("up_weight", up_weight, {width, hidden}, x, dtype);
  STD_TORCH_CHECK(down_weight.is_contiguous() && up_weight.is_contiguous(), kWho, "the weights must be contiguous");
  if (down_bias.has_value()) check_tensor("down_bias", *down_bias, {hidden}, x, dtype);
  fastpeft::Adapter a{};
  a.element = element_of(dtype);
  a.rows = rows;
  a.width = static_cast<int>(width), a.hidden = static_cast<int>(hidden);
  a.activation = static_cast<int>(activation);
  a.x = pointer(x), a.down = pointer(down_weight), a.down_bias = pointer(down_bias), a.up = pointer(up_weight);
  a.x_stride = stride(x, 0);
  a.scale = static_cast<float>(scale);
  return a;
}

Tensor adapter_forward(const Tensor& x, const Tensor& down_weight, const OptionalTensor& down_bias,
                       const Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& residual,
                       int64_t activation, double scale) {
  const fastpeft::Adapter a = adapter(x, down_weight, down_bias, up_weight, activation, scale);
  const ScalarType dtype = x.scalar_type();
  if (up_bias.has_value()) check_tensor("up_bias", *up_bias, {a.width}, x, dtype);
  if (residual.has_value()) check_tensor("residual", *residual, shape_of(x), x, dtype);
  const Tensor y = empty(x, shape_of(x), dtype);
  const DeviceGuard guard(x.get_device_index());
  fastpeft::adapter_forward(a, {pointer(up_bias), pointer(residual), row_stride(residual), pointer(y)},
                            current_stream(x.get_device_index()));
  return y;
}

// Bits of `needs`, which fastpeft/ops/cuda_adapter.py sets.
enum AdapterNeed : int64_t { kX = 1, kWeights = 2 };

std::tuple<Tensor, Tensor, Tensor> adapter_backward(const Tensor& dy, const Tensor& x, const Tensor& down_weight,
                                                    const OptionalTensor& down_bias, const Tensor& up_weight,
                                                    const OptionalTensor& add, int64_t activation, double scale,
                                                    int64_t needs) {
  const fastpeft::Adapter a = adapter(x, down_weight, down_bias, up_weight, activation, scale);
  const ScalarType dtype = x.scalar_type();
  check_tensor("dy", dy, shape_of(x), x, dtype);
  if (add.has_value()) check_tensor("add", *add, shape_of(x), x, dtype);
  const bool hidden = needs & kWeights;
  const Tensor dx = empty(x, needs & kX ? shape_of(x) : Sizes{0}, dtype);
  const Tensor dz = empty(x, hidden ? Sizes{a.rows, a.hidden} : Sizes{0}, dtype);
  const Tensor h = empty(x, hidden ? Sizes{a.rows, a.hidden} : Sizes{0}, dtype);
  if (needs & (kX | kWeights)) {
    const DeviceGuard guard(x.get_device_index());
    const auto target = [](const Tensor& t) { return t.numel() > 0 ? pointer(t) : nullptr; };
    fastpeft::adapter_backward(
        a, {pointer(dy), pointer(add), stride(dy, 0), row_stride(add), target(dx), target(dz), target(h)},
        current_stream(x.get_device_index()));
  }
  return {dx, dz, h};
}

}  // namespace

// One more level, since STABLE_TORCH_LIBRARY takes its arguments as they are written.
#define FASTPEFT_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define FASTPEFT_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

FASTPEFT_DEFINE(FASTPEFT_LIBRARY, m) {
  m.def(
      "prompt_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, float scale, "
      "bool causal) -> (Tensor out, Tensor lse)");
  m.def(
      "prompt_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, "
      "Tensor out, Tensor lse, float scale, bool causal, int needs, Tensor(a!)? packed=None) -> (Tensor dq, "
      "Tensor dk, Tensor dv, Tensor dprompt_k, Tensor dprompt_v)");
  m.def(
      "adapter_forward(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? residual, int activation, float scale) -> Tensor");
  m.def(
      "adapter_backward(Tensor dy, Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? add, "
      "int activation, float scale, int needs) -> (Tensor dx, Tensor dz, Tensor h)");
}

FASTPEFT_IMPLEMENT(FASTPEFT_LIBRARY, FASTPEFT_DISPATCH_KEY, m) {
  m.impl("prompt_attention_forward", TORCH_BOX(&prompt_attention_forward));
  m.impl("prompt_attention_backward", TORCH_BOX(&prompt_attention_backward));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward));
}
