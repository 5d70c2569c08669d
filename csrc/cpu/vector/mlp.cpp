// What stands beside the products of a frozen MLP and of an adapter, in place. fastpeft/native/vector/mlp.py and adapter.py
// lay this out.

#include "activation.h"

namespace fastpeft {
namespace {

// What the forward pass keeps: nothing, z as it is stored, act'(z) as a code of eight bits.
enum Kept : int32_t { kNothing = 0, kPreactivation = 1, kCode = 2 };

// What a code stands for: low + step * code. fastpeft/ops/mlp.py names the same numbers.
constexpr float kSlopeLow = -0.135f, kSlopeStep = 1.27f / 255.0f;

struct Mlp {
  int64_t rows, columns;
  void* values;       // (rows, columns): z in, act(z) out; backward: the gradient of act(z) in, of z out
  const float* bias;  // columns, added to z first; or null
  void* kept;         // (rows, columns) in the values' type, or bytes
  // An adapter's hidden units, beside the gradient: act(z) is written over z in `kept`, and the gradient of act(z) is scaled.
  float scale;
  int32_t writes_hidden;
  int32_t activation, keep, threads, half;
};

FASTPEFT_INLINE void store_code(uint8_t* p, Floats slope, Whole) {
  Floats code = (slope - kSlopeLow) * (1.0f / kSlopeStep) + 0.5f;
  code = code < 0.0f ? Floats{} : code > 255.0f ? all(255.0f) : code;
  *reinterpret_cast<BytesAt*>(p) = __builtin_convertvector(__builtin_convertvector(code, Ints), Bytes);
}
FASTPEFT_INLINE Floats load_slope(const uint8_t* p, Whole) {
  const Bytes code = *reinterpret_cast<const BytesAt*>(p);
  return __builtin_convertvector(__builtin_convertvector(code, Ints), Floats) * kSlopeStep + kSlopeLow;
}
FASTPEFT_INLINE void store_code(uint8_t* p, Floats slope, Part part) {
  uint8_t held[kWidth];
  store_code(held, slope, Whole{});
  for (int64_t i = 0; i < part.count; ++i) p[i] = held[i];
}
FASTPEFT_INLINE Floats load_slope(const uint8_t* p, Part part) {
  uint8_t held[kWidth] = {};
  for (int64_t i = 0; i < part.count; ++i) held[i] = p[i];
  return load_slope(held, Whole{});
}

// Splits the rows among threads.
template <class Body>
FASTPEFT_INLINE void each_row(const Mlp& a, const Body& body) {
  const int threads = team(a.threads, a.rows);
  parallel(threads, [&](int index) {
    const Range mine = part_of(a.rows, threads, index);
    for (int64_t r = mine.begin; r < mine.end; ++r) body(r * a.columns);
  });
}

template <class T, int kind, int keep>
void forward_as(const Mlp& a) {
  each_row(a, [&](int64_t row) {
    T* values = static_cast<T*>(a.values) + row;
    T* kept = static_cast<T*>(a.kept) + row;
    uint8_t* codes = static_cast<uint8_t*>(a.kept) + row;
    over(a.columns, [&](int64_t i, auto how, int) {
      Floats z = load(values + i, how);
      if (a.bias) z += load(a.bias + i, how);
      const Activated found = activate<kind>(z);
      store(values + i, found.value, how);
      if constexpr (keep == kPreactivation) store(kept + i, z, how);
      if constexpr (keep == kCode) store_code(codes + i, found.slope, how);
    });
  });
}

template <class T, int kind, int keep>
void backward_as(const Mlp& a) {
  each_row(a, [&](int64_t row) {
    T* values = static_cast<T*>(a.values) + row;
    T* kept = static_cast<T*>(a.kept) + row;
    uint8_t* codes = static_cast<uint8_t*>(a.kept) + row;
    over(a.columns, [&](int64_t i, auto how, int) {
      Floats slope;
      if constexpr (keep == kCode) {
        slope = load_slope(codes + i, how);
      } else {
        Floats z = load(kept + i, how);
        if (a.bias) z += load(a.bias + i, how);
        const Activated found = activate<kind>(z);
        slope = found.slope * a.scale;
        if (a.writes_hidden) store(kept + i, found.value, how);
      }
      store(values + i, load(values + i, how) * slope, how);
    });
  });
}

// The end of an adapter: (u + bias) * scale + residual in the place of u.
struct Sum {
  int64_t rows, columns;
  void* values;           // (rows, columns)
  const float* bias;      // columns, or null
  const void* residual;   // rows at a distance, or null
  int64_t residual_row;
  float scale;
  int32_t threads, half, unused;
};

template <class T>
void add_residual(const Sum& a) {
  const int threads = team(a.threads, a.rows);
  parallel(threads, [&](int index) {
    const Range mine = part_of(a.rows, threads, index);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      T* values = static_cast<T*>(a.values) + r * a.columns;
      const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * a.residual_row : nullptr;
      over(a.columns, [&](int64_t i, auto how, int) {
        Floats u = load(values + i, how);
        if (a.bias) u += load(a.bias + i, how);
        u *= a.scale;
        if (residual) u += load(residual + i, how);
        store(values + i, u, how);
      });
    }
  });
}

template <class T>
void forward(const Mlp& a) {
  with_activation(a.activation, [&](auto kind) {
    constexpr int32_t which = decltype(kind)::value;
    if (a.keep == kNothing) return forward_as<T, which, kNothing>(a);
    if (a.keep == kPreactivation) return forward_as<T, which, kPreactivation>(a);
    return forward_as<T, which, kCode>(a);
  });
}

template <class T>
void backward(const Mlp& a) {
  // Codes are the same of every activation.
  if (a.keep == kCode) return backward_as<T, kIdentity, kCode>(a);
  with_activation(a.activation, [&](auto kind) { backward_as<T, decltype(kind)::value, kPreactivation>(a); });
}

}  // namespace
}  // namespace fastpeft

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(mlp_forward)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::Mlp*>(arguments);
  a.half ? fastpeft::forward<fastpeft::bf16>(a) : fastpeft::forward<float>(a);
  return fastpeft::kOk;
}

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(mlp_backward)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::Mlp*>(arguments);
  a.half ? fastpeft::backward<fastpeft::bf16>(a) : fastpeft::backward<float>(a);
  return fastpeft::kOk;
}

FASTPEFT_EXPORT int32_t FASTPEFT_NAME(adapter_sum)(const void* arguments) {
  const auto& a = *static_cast<const fastpeft::Sum*>(arguments);
  a.half ? fastpeft::add_residual<fastpeft::bf16>(a) : fastpeft::add_residual<float>(a);
  return fastpeft::kOk;
}
