// From fp32 sums to what is stored, a few rows at a time: the rows of one product are finished between the steps of the
// next, while the matrix unit works.

#pragma once

#include "matrix.h"

namespace fastpeft {

// A 32 x 32 product whose sums wait in `sums`.
struct Finished {
  const Gemm* gemm;
  const float* sums;
  int64_t row_block, column_block;
};

// Finishes the rows begin..end of the 32.
using Finish = void (*)(const Finished&, int64_t begin, int64_t end);

FASTPEFT_INLINE Row sums_of(const float* sums, int64_t row) {
  const float* p = sums + (row / 16) * 512 + (row % 16) * 16;
  return {_mm512_load_ps(p), _mm512_load_ps(p + 256)};
}

template <int epilogue, int activation, int keep>
void finish(const Finished& f, int64_t begin, int64_t end) {
  const Gemm& g = *f.gemm;
  // Blocks of a blocked matrix are whole; of a row-major one only the rows that there are exist.
  end = smaller(end, g.rows - f.row_block * kBlock);
  const int64_t columns = g.columns / kBlock;
  Row bias = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (g.bias != nullptr) {
    bias.low = _mm512_loadu_ps(g.bias + f.column_block * kBlock);
    bias.high = _mm512_loadu_ps(g.bias + f.column_block * kBlock + 16);
  }
  for (int64_t row = begin; row < end; ++row) {
    Row s = sums_of(f.sums, row);
    if constexpr (epilogue != kScale) {
      s.low = _mm512_add_ps(s.low, bias.low);
      s.high = _mm512_add_ps(s.high, bias.high);
    }
    [[maybe_unused]] const int64_t at = (f.row_block * columns + f.column_block) * kBlockSize + row * kBlock;
    if constexpr (epilogue == kResidual) {
      const Row other = read(g.other, f.row_block, row, f.column_block);
      s.low = _mm512_add_ps(s.low, other.low);
      s.high = _mm512_add_ps(s.high, other.high);
      if (g.another.data != nullptr) {
        const Row another = read(g.another, f.row_block, row, f.column_block);
        s.low = _mm512_add_ps(s.low, another.low);
        s.high = _mm512_add_ps(s.high, another.high);
      }
    } else if constexpr (epilogue == kActivate) {
      const Activated low = activate<activation>(s.low), high = activate<activation>(s.high);
      s = {low.value, high.value};
      if constexpr (keep == kSlope16) {
        _mm512_store_si512(static_cast<bf16*>(g.kept) + at, narrow(low.slope, high.slope));
      } else if constexpr (keep == kSlope8) {
        auto* code = static_cast<uint8_t*>(g.kept) + at;
        _mm_store_si128(reinterpret_cast<__m128i*>(code), encode_slope(low.slope));
        _mm_store_si128(reinterpret_cast<__m128i*>(code + 16), encode_slope(high.slope));
      }
    } else if constexpr (epilogue == kScale) {
      if constexpr (keep == kSlope16) {
        const __m512i slopes = _mm512_load_si512(static_cast<const bf16*>(g.kept) + at);
        s.low = _mm512_mul_ps(s.low, low_half(slopes));
        s.high = _mm512_mul_ps(s.high, high_half(slopes));
      } else {
        const auto* code = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(g.kept) + at);
        s.low = _mm512_mul_ps(s.low, decode_slope(_mm_load_si128(code)));
        s.high = _mm512_mul_ps(s.high, decode_slope(_mm_load_si128(code + 1)));
      }
    }
    write(g.c, f.row_block, row, f.column_block, s);
  }
}

template <int activation>
Finish activated(int32_t keep) {
  return keep == kNothing    ? finish<kActivate, activation, kNothing>
         : keep == kSlope16 ? finish<kActivate, activation, kSlope16>
                            : finish<kActivate, activation, kSlope8>;
}

inline Finish choose_finish(const Gemm& g) {
  switch (g.epilogue) {
    case kResidual:
      return finish<kResidual, kIdentity, kNothing>;
    case kScale:
      return g.keep == kSlope16 ? finish<kScale, kIdentity, kSlope16> : finish<kScale, kIdentity, kSlope8>;
    case kActivate:
      switch (g.activation) {
        case kRelu:
          return activated<kRelu>(g.keep);
        case kGelu:
          return activated<kGelu>(g.keep);
        case kGeluTanh:
          return activated<kGeluTanh>(g.keep);
        case kQuickGelu:
          return activated<kQuickGelu>(g.keep);
        case kSilu:
          return activated<kSilu>(g.keep);
        default:
          return activated<kIdentity>(g.keep);
      }
    default:
      return finish<kStore, kIdentity, kNothing>;
  }
}

}  // namespace fastpeft
