// Activations and their derivatives, in fp32. The codes are those of kernels/_activation.py.

#pragma once

#include "primitives.cuh"

namespace fastpeft {

enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu };

// act(z) = z * sigmoid(linear z + cubic z^3) for three of them. For gelu_tanh this is its 0.5 (1 + tanh(u)) with 2 u in
// the sigmoid.
struct Gate {
  float linear, cubic;

  FASTPEFT_DEVICE explicit Gate(int code)
      : linear(code == kGeluTanh    ? 1.5957691216057308f
               : code == kQuickGelu ? 1.702f
                                    : 1.0f),
        cubic(code == kGeluTanh ? 0.07135481627260025f : 0.0f) {}

  FASTPEFT_DEVICE float operator()(float z) const {
    const float u = z * (linear + cubic * z * z);
    return reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * u));
  }
};

FASTPEFT_DEVICE float normal_cdf(float z) { return 0.5f * (1.0f + erff(0.7071067811865476f * z)); }

// z <- act(z)
template <int N>
FASTPEFT_DEVICE void activate(float (&z)[1][N][4], int code) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[0][n][i] = f(z[0][n][i]);
    }
  };
  if (code == kRelu) {
    each([](float z) { return z <= 0.0f ? 0.0f : z; });
  } else if (code == kGelu) {
    each([](float z) { return z * normal_cdf(z); });
  } else if (code != kIdentity) {
    const Gate gate(code);
    each([&](float z) { return z * gate(z); });
  }
}

// d <- d * act'(z), then z <- act(z)
template <int N>
FASTPEFT_DEVICE void differentiate(float (&z)[1][N][4], float (&d)[1][N][4], int code) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(z[0][n][i], d[0][n][i]);
    }
  };
  if (code == kRelu) {
    each([](float& z, float& d) {
      d = z <= 0.0f ? 0.0f : d;
      z = z <= 0.0f ? 0.0f : z;
    });
  } else if (code == kGelu) {
    each([](float& z, float& d) {
      const float cdf = normal_cdf(z);
      d *= cdf + z * 0.3989422804014327f * exp2_fast(-0.7213475204444817f * z * z);
      z *= cdf;
    });
  } else if (code != kIdentity) {
    const Gate gate(code);
    each([&](float& z, float& d) {
      const float s = gate(z);
      d *= s + z * s * (1.0f - s) * (gate.linear + 3.0f * gate.cubic * z * z);
      z *= s;
    });
  }
}

}  // namespace fastpeft
