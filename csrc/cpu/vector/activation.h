// The activations and their derivatives in fp32, to a few units of the last place.

#pragma once

#include "vector.h"

namespace fastpeft {
namespace {

// The order is the interface: fastpeft/native/vector/mlp.py names them.
enum Activation : int32_t { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kQuickGelu = 4, kSilu = 5 };

struct Activated {
  Floats value, slope;
};

FASTPEFT_INLINE Floats size_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// z * sigmoid(u), with u' = du; without overflow, and without the difference 1 - sigmoid.
FASTPEFT_INLINE Activated gated(Floats z, Floats u, Floats du) {
  const Floats e = exp2(size_of(u) * -kLog2E), r = 1.0f / (1.0f + e);
  const Floats s = u < 0.0f ? e * r : r;
  return {z * s, s + z * (e * r * r) * du};
}

// By the normal distribution's tail, Phi(-|z|) = exp(-z^2 / 2) * t * poly(t) with t = 1 / (1 + 0.3 |z|), whose exponential
// the derivative shares. The polynomial is a fit of least relative error, 1.2e-7 for |z| up to 13.2, where the tail ends.
FASTPEFT_INLINE Activated gelu(Floats z) {
  const Floats t = 1.0f / (1.0f + 0.3f * size_of(z));
  Floats p = t * 0.036088828f - 0.158933699f;
  p = p * t + 0.209346339f;
  p = p * t - 0.0564500578f;
  p = p * t + 0.130032599f;
  p = p * t + 0.0994650647f;
  p = p * t + 0.120826311f;
  p = p * t + 0.11962454f;
  const Floats e = exp2(z * z * (-0.5f * kLog2E));
  const Floats tail = e * (p * t);
  const Floats phi = z < 0.0f ? tail : 1.0f - tail;
  // Where the density has vanished its product with z has, too, be z infinite.
  return {z < -14.0f ? tail : z * phi, phi + (e == 0.0f ? Floats{} : z * e * 0.3989422804f)};
}

template <int kind>
FASTPEFT_INLINE Activated activate(Floats z) {
  if constexpr (kind == kIdentity) {
    return {z, all(1.0f)};
  } else if constexpr (kind == kRelu) {
    return {z < 0.0f ? Floats{} : z, z > 0.0f ? all(1.0f) : Floats{}};
  } else if constexpr (kind == kGelu) {
    return gelu(z);
  } else if constexpr (kind == kGeluTanh) {
    // tanh written as a sigmoid: 0.5 (1 + tanh w) = sigmoid(2 w), w = sqrt(2 / pi) (z + 0.044715 z^3). Both tails are long
    // reached where the square is cut off.
    const Floats square = z * z, cut = square > 1e6f ? all(1e6f) : square;
    return gated(z, z * (cut * 0.07135481627f + 1.595769121605731f), cut * 0.21406444881f + 1.595769121605731f);
  } else if constexpr (kind == kQuickGelu) {
    return gated(z, z * 1.702f, all(1.702f));
  } else {
    return gated(z, z, all(1.0f));
  }
}

// Calls body with the activation as a type whose `value` is its number, so that each has a loop of its own.
template <int32_t kind>
struct Kind {
  static constexpr int32_t value = kind;
};

template <class Body>
FASTPEFT_INLINE void with_activation(int32_t activation, const Body& body) {
  switch (activation) {
    case kIdentity: return body(Kind<kIdentity>{});
    case kRelu: return body(Kind<kRelu>{});
    case kGelu: return body(Kind<kGelu>{});
    case kGeluTanh: return body(Kind<kGeluTanh>{});
    case kQuickGelu: return body(Kind<kQuickGelu>{});
    default: return body(Kind<kSilu>{});
  }
}

}  // namespace
}  // namespace fastpeft
