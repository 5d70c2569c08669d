// Sixteen numbers at a time: conversions, exp, the activations with their derivatives, transposition.

#pragma once

#include <immintrin.h>

#include "../common.h"

namespace fastpeft {

FASTPEFT_INLINE __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FASTPEFT_INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
FASTPEFT_INLINE __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

FASTPEFT_INLINE __m512 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FASTPEFT_INLINE void store(bf16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
FASTPEFT_INLINE __m512 low_half(__m512i x) { return widen(_mm512_castsi512_si256(x)); }
FASTPEFT_INLINE __m512 high_half(__m512i x) { return widen(_mm512_extracti64x4_epi64(x, 1)); }

// A value that gcc knows nothing of: a loop that copies lines must not become a string instruction, which takes dozens of
// cycles to begin.
FASTPEFT_INLINE __m512i opaque(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

FASTPEFT_INLINE __m512 constant(float x) { return _mm512_set1_ps(x); }

// 2^x for any x, relative error 3e-6: the fraction by a polynomial, the whole part by the exponent. What is computed
// with it is rounded to bf16.
FASTPEFT_INLINE __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = constant(9.570111394919827e-3f);
  p = _mm512_fmadd_ps(p, f, constant(5.5917888654011e-2f));
  p = _mm512_fmadd_ps(p, f, constant(2.4024744873450093e-1f));
  p = _mm512_fmadd_ps(p, f, constant(6.931218113003195e-1f));
  p = _mm512_fmadd_ps(p, f, constant(9.999992613465958e-1f));
  return _mm512_scalef_ps(p, whole);
}

// 1 / x to about 1e-7.
FASTPEFT_INLINE __m512 reciprocal(__m512 x) {
  const __m512 r = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, constant(2.0f)));
}

// ln x for normal x > 0, error 2e-7 of the larger of it and 1: the mantissa m in [0.75, 1.5) by the series of
// 2 artanh((m - 1) / (m + 1)), the exponent by itself.
FASTPEFT_INLINE __m512 log(__m512 x) {
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const __m512 exponent = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, constant(1.0f)), _mm512_add_ps(m, constant(1.0f)));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 p = constant(2.0f / 9);
  p = _mm512_fmadd_ps(p, square, constant(2.0f / 7));
  p = _mm512_fmadd_ps(p, square, constant(2.0f / 5));
  p = _mm512_fmadd_ps(p, square, constant(2.0f / 3));
  p = _mm512_fmadd_ps(p, square, constant(2.0f));
  return _mm512_fmadd_ps(exponent, constant(0.6931471805599453f), _mm512_mul_ps(p, s));
}

constexpr float kLog2E = 1.4426950408889634f;

enum Activation : int32_t { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kQuickGelu = 4, kSilu = 5 };

struct Activated {
  __m512 value, slope;
};

// z * sigmoid(u) with u = z * g(z^2) and u' given.
FASTPEFT_INLINE Activated gated(__m512 z, __m512 u, __m512 du) {
  const __m512 x = _mm512_min_ps(_mm512_mul_ps(u, constant(-kLog2E)), constant(126.0f));
  const __m512 s = reciprocal(_mm512_add_ps(constant(1.0f), exp2(x)));
  const __m512 value = _mm512_mul_ps(z, s);
  // s + z s (1 - s) u'
  const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_fnmadd_ps(value, s, value), du), constant(1.0f), s);
  return {value, slope};
}

// GELU by the normal distribution's tail, Phi(-|z|) = exp(-z^2 / 2) * t * poly(t), t = 1 / (1 + 0.3 |z|), whose exponential
// the derivative shares. The polynomial is a fit of least relative error, 7e-6 for |z| up to 13, where the tail ends.
FASTPEFT_INLINE Activated gelu(__m512 z) {
  const __m512 size = _mm512_abs_ps(z);
  const __m512 t = reciprocal(_mm512_fmadd_ps(size, constant(0.3f), constant(1.0f)));
  __m512 p = constant(-7.767377372459405e-2f);
  p = _mm512_fmadd_ps(p, t, constant(2.177712344095314e-1f));
  p = _mm512_fmadd_ps(p, t, constant(-1.8931943825821463e-2f));
  p = _mm512_fmadd_ps(p, t, constant(1.4526726524405628e-1f));
  p = _mm512_fmadd_ps(p, t, constant(1.1347109610200848e-1f));
  p = _mm512_fmadd_ps(p, t, constant(1.2009975462795948e-1f));
  const __m512 x = _mm512_mul_ps(_mm512_mul_ps(z, z), constant(-0.5f * kLog2E));
  const __m512 e = exp2(_mm512_max_ps(x, constant(-1000.0f)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);  // Phi(-|z|)
  const __mmask16 positive = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GE_OQ);
  const __m512 phi = _mm512_mask_sub_ps(tail, positive, constant(1.0f), tail);
  return {_mm512_mul_ps(z, phi), _mm512_fmadd_ps(_mm512_mul_ps(z, e), constant(0.3989422804014327f), phi)};
}

template <int kind>
FASTPEFT_INLINE Activated activate(__m512 z) {
  if constexpr (kind == kIdentity) {
    return {z, constant(1.0f)};
  } else if constexpr (kind == kRelu) {
    const __mmask16 positive = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GT_OQ);
    return {_mm512_max_ps(z, _mm512_setzero_ps()), _mm512_maskz_mov_ps(positive, constant(1.0f))};
  } else if constexpr (kind == kGelu) {
    return gelu(z);
  } else if constexpr (kind == kGeluTanh) {
    // tanh written as a sigmoid: 0.5 (1 + tanh w) = sigmoid(2 w), w = sqrt(2 / pi) (z + 0.044715 z^3).
    const __m512 square = _mm512_mul_ps(z, z);
    const __m512 g = _mm512_fmadd_ps(square, constant(0.07135481627f), constant(1.595769121605731f));
    const __m512 du = _mm512_fmadd_ps(square, constant(0.21406444881f), constant(1.595769121605731f));
    return gated(z, _mm512_mul_ps(z, g), du);
  } else if constexpr (kind == kQuickGelu) {
    return gated(z, _mm512_mul_ps(z, constant(1.702f)), constant(1.702f));
  } else {
    return gated(z, z, constant(1.0f));
  }
}

// What stands for a derivative in eight bits: low + step * code. fastpeft/ops/mlp.py names the same numbers.
constexpr float kSlopeLow = -0.135f, kSlopeStep = 1.27f / 255.0f;

FASTPEFT_INLINE __m128i encode_slope(__m512 slope) {
  const __m512 code = _mm512_mul_ps(_mm512_sub_ps(slope, constant(kSlopeLow)), constant(1.0f / kSlopeStep));
  return _mm512_cvtusepi32_epi8(_mm512_cvtps_epu32(_mm512_max_ps(code, _mm512_setzero_ps())));
}

FASTPEFT_INLINE __m512 decode_slope(__m128i code) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code)), constant(kSlopeStep), constant(kSlopeLow));
}

// Sixteen rows of sixteen doublewords, transposed in place.
FASTPEFT_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 16; h += 8)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[h + i] = _mm512_shuffle_i32x4(r[h + i], r[h + i + 4], 0x88);
      t[h + i + 4] = _mm512_shuffle_i32x4(r[h + i], r[h + i + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Two rows of 32 bf16 as 32 pairs: (a0 b0 a1 b1 ...), the first sixteen columns' pairs and the last sixteen's.
FASTPEFT_INLINE void interleave(__m512i a, __m512i b, __m512i* first, __m512i* second) {
  const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
  const __m512i x = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
  const __m512i y = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
  *first = x;
  *second = y;
}

}  // namespace fastpeft
