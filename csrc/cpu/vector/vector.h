// As many numbers at a time as the instruction set has room for, by the compiler's vector types: loads and stores of fp32 and
// bf16, sums, exp, and transposition. Everything is in an anonymous namespace and inlined, since the same file is compiled
// for several instruction sets and the linker must not take one's function for another's.

#pragma once

#include "../common.h"

namespace fastpeft {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
// The same in memory, at any address.
typedef float FloatsAt __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t IntsAt __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef uint8_t BytesAt __attribute__((vector_size(kWidth), aligned(1), may_alias));

// Subtracting zeros changes no number, and compilers know it.
FASTPEFT_INLINE Floats all(float x) { return x - Floats{}; }
FASTPEFT_INLINE Ints all(int32_t x) { return x - Ints{}; }

FASTPEFT_INLINE Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Bits) << 16); }

// To nearest, ties to even; a NaN stays one.
FASTPEFT_INLINE Halves narrow(Floats x) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((Bits)(x == x ? (Ints)rounded : (Ints)((bits >> 16) | 0x40)), Halves);
}

FASTPEFT_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

FASTPEFT_INLINE Floats load(const float* p) { return *reinterpret_cast<const FloatsAt*>(p); }
FASTPEFT_INLINE Floats load(const bf16* p) { return widen(*reinterpret_cast<const HalvesAt*>(p)); }
FASTPEFT_INLINE void store(float* p, Floats x) { *reinterpret_cast<FloatsAt*>(p) = x; }
FASTPEFT_INLINE void store(bf16* p, Floats x) { *reinterpret_cast<HalvesAt*>(p) = narrow(x); }

// What a number is after it was stored.
FASTPEFT_INLINE Floats rounded(const float*, Floats x) { return x; }
FASTPEFT_INLINE Floats rounded(const bf16*, Floats x) { return widen(narrow(x)); }

// How much of a vector is meant: all of it, or the first `count`, 1 to kWidth - 1, of which there may be no more in memory.
// The others are read as zero and not written.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
FASTPEFT_INLINE Floats load(const T* p, Whole) {
  return load(p);
}
template <class T>
FASTPEFT_INLINE Floats load(const T* p, Part part) {
  T held[kWidth] = {};
  for (int64_t i = 0; i < part.count; ++i) held[i] = p[i];
  return load(held);
}
template <class T>
FASTPEFT_INLINE void store(T* p, Floats x, Whole) {
  store(p, x);
}
template <class T>
FASTPEFT_INLINE void store(T* p, Floats x, Part part) {
  T held[kWidth];
  store(held, x);
  for (int64_t i = 0; i < part.count; ++i) p[i] = held[i];
}

// Calls body(i, how, k) for each vector's first index in [0, count), with how much of it lies in the range, and with k going
// round 0 to 3, so that what follows on itself can be in four pieces at once.
template <class Body>
FASTPEFT_INLINE void over(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    body(i, Whole{}, 0);
    body(i + kWidth, Whole{}, 1);
    body(i + 2 * kWidth, Whole{}, 2);
    body(i + 3 * kWidth, Whole{}, 3);
  }
  for (; i + kWidth <= count; i += kWidth) body(i, Whole{}, 0);
  if (i < count) body(i, Part{count - i}, 0);
}

FASTPEFT_INLINE int64_t whole_vectors(int64_t count) { return ceil_div<int64_t>(count, kWidth) * kWidth; }

FASTPEFT_INLINE Ints lanes() {
  Ints found;
  for (int i = 0; i < kWidth; ++i) found[i] = i;
  return found;
}

// Elements of the two vectors one after another, by index; the indices are constants once everything is inlined.
FASTPEFT_INLINE Floats pick(Floats a, Floats b, Ints index) {
#if defined(__clang__)
  Floats found;
  for (int i = 0; i < kWidth; ++i) found[i] = index[i] < kWidth ? a[index[i]] : b[index[i] - kWidth];
  return found;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

FASTPEFT_INLINE float sum(Floats x) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) x += pick(x, x, lanes() ^ step);
  return x[0];
}

FASTPEFT_INLINE float sum(const Floats x[4]) { return sum((x[0] + x[1]) + (x[2] + x[3])); }

// Zero beyond what is meant.
FASTPEFT_INLINE Floats within(Floats x, Whole) { return x; }
FASTPEFT_INLINE Floats within(Floats x, Part part) { return lanes() < static_cast<int32_t>(part.count) ? x : Floats{}; }

FASTPEFT_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

FASTPEFT_INLINE float largest(Floats x) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) x = larger(x, pick(x, x, lanes() ^ step));
  return x[0];
}

constexpr float kLog2E = 1.4426950408889634f;

// 2^x, relative error 1e-7; 0 below 2^-126. The whole part becomes the exponent, the fraction enters a polynomial of least
// relative error.
FASTPEFT_INLINE Floats exp2(Floats x) {
  x = x < -127.0f ? all(-127.0f) : x > 128.0f ? all(128.0f) : x;
  // The sum has no room for a fraction: it holds the whole part in its lowest bits.
  const Floats shifted = x + 12582912.0f;
  const Floats f = x - (shifted - 12582912.0f);
  Floats p = f * 1.53458066e-4f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 0.240226462f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
  return p * (Floats)(((Bits)shifted + 127) << 23);
}

FASTPEFT_INLINE Floats exp(Floats x) { return exp2(x * kLog2E); }

// Columns of kWidth rows: a step puts the two halves of the rows between each other, and log2(kWidth) steps transpose.
FASTPEFT_INLINE void transpose(Floats r[kWidth]) {
  const Ints low = (lanes() >> 1) + (lanes() & 1) * kWidth, high = low + kWidth / 2;
#pragma GCC unroll 4
  for (int step = 1; step < kWidth; step *= 2) {
    Floats t[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      t[2 * i] = pick(r[i], r[i + kWidth / 2], low);
      t[2 * i + 1] = pick(r[i], r[i + kWidth / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) r[i] = t[i];
  }
}

}  // namespace
}  // namespace fastpeft
