// Attention over tokens and prompts, forward:
//
//   out = softmax(scale * q [k; prompt_k]^T) [v; prompt_v],   lse = log sum_j exp(scale * q k_j)
//
// A block of four warps has 128 queries of one head, 32 a warp. The keys, tokens and prompts behind one another, pass by
// in tiles: while one is multiplied the next is on its way into the other half of a double buffer. Nothing of the size
// queries x keys is ever in memory.

#include "attention.cuh"

namespace fastpeft {
namespace {

constexpr int kM = 2;  // blocks of 16 queries a warp
constexpr int kQueries = 16 * kM * kWarps;

// Keys a tile: as many as registers (the scores) and 99 KB of shared memory allow.
template <int D>
constexpr int kKeys = D <= 80 ? 64 : D <= 96 ? 48 : 32;

// The queries stay in registers where those suffice; they are read again from shared memory for every tile otherwise.
template <int D>
constexpr bool kKeepsQueries = D <= 64;

struct Params {
  View q, k, v, prompt_k, prompt_v, out;
  float* lse;  // (batch, heads, queries)
  int heads, queries, query_blocks;
  Visibility visibility;
  float scale;
};

template <int D>
constexpr int kSharedBytes = kTileBytes<kQueries + 4 * kKeys<D>, D>;

// Scores, softmax and P V of one tile of keys for this warp's queries. CHECKED: some pairs are hidden, or there are fewer
// keys than the tile holds.
template <class T, int D, bool CHECKED>
FASTPEFT_DEVICE void attend(float (&out)[kM][D / 8][4], Softmax<kM>& softmax, const uint32_t (&kept)[D / 16][kM][4],
                            Shared q, Shared k, Shared v, const Visibility& visibility, int query, int key,
                            float factor) {
  constexpr int kGroups = kKeys<D> / 16;
  const int groups = CHECKED ? least(kGroups, (visibility.keys - key + 15) / 16) : kGroups;
  float s[kM][2 * kGroups][4];
  clear(s);
  if constexpr (kKeepsQueries<D>) {
    multiply_transposed<T, D, kM, kGroups, CHECKED>(s, kept, lane_of_columns<D>(k), groups);
  } else {
    multiply_transposed<T, D, kM, kGroups, CHECKED>(s, lane_of_rows<D>(q), lane_of_columns<D>(k), groups);
  }
  if constexpr (CHECKED) {
    const int row = query + lane_index() / 4, column = key + lane_index() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!visibility.sees(row + 16 * m + i / 2 * 8, column + 8 * n + i % 2)) s[m][n][i] = kHidden;
        }
      }
    }
  }
  softmax.update(s, out, factor);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (CHECKED && g >= groups) continue;
    uint32_t p[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) pack_left<T>(p[m], s[m][2 * g], s[m][2 * g + 1]);
    multiply_block<T, D, kPitch<D>>(out, p, lane_of_rows<D>(v) + g * 16 * kPitch<D>);
  }
}

template <class T, int D>
FASTPEFT_KERNEL(kThreads, 2)
forward_kernel(const Params p) {
  const int64_t index = block_index();
  const int block = static_cast<int>(index % p.query_blocks);
  const int head = static_cast<int>(index / p.query_blocks % p.heads);
  const int64_t batch = index / p.query_blocks / p.heads;
  const int first = block * kQueries;
  const int warp_first = 16 * kM * warp_index();
  const int query = first + warp_first;
  const bool active = query < p.queries;
  const KeyTiles<kKeys<D>> tiles(p.visibility, least(first + kQueries, p.queries));
  const float factor = p.scale * kLog2E;

  const Shared q = shared_memory();
  const Shared buffers = q + kTileBytes<kQueries, D>;
  const auto k_buffer = [&](int i) { return buffers + (i % 2) * kTileBytes<2 * kKeys<D>, D>; };
  const auto v_buffer = [&](int i) { return k_buffer(i) + kTileBytes<kKeys<D>, D>; };
  const auto start_tile = [&](int i) {
    const int key = tiles(i), tokens = p.visibility.tokens, keys = p.visibility.keys;
    copy_tile<kKeys<D>, D, kThreads>(k_buffer(i), KeyRows(p.k, p.prompt_k, batch, head, tokens, key, keys));
    copy_tile<kKeys<D>, D, kThreads>(v_buffer(i), KeyRows(p.v, p.prompt_v, batch, head, tokens, key, keys));
    copy_commit();
  };

  copy_tile<kQueries, D, kThreads>(q, HeadRows(p.q, batch, head, first, p.queries));
  start_tile(0);

  uint32_t kept[D / 16][kM][4];
  float out[kM][D / 8][4];
  clear(out);
  Softmax<kM> softmax;
  const Shared own = q + warp_first * kPitch<D>;
  for (int i = 0; i < tiles.count; ++i) {
    copy_wait<0>();
    block_sync();  // the tile is there for all, and nobody reads the one before it any more
    if (i + 1 < tiles.count) start_tile(i + 1);
    if (!active) continue;
    if (kKeepsQueries<D> && i == 0) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          load_matrices(kept[step][m], lane_of_rows<D>(own) + m * 16 * kPitch<D> + step * 32);
        }
      }
    }
    const int key = tiles(i), key_end = key + kKeys<D>;
    if (p.visibility.hides_all(query + 16 * kM, key, key_end)) continue;
    if (p.visibility.hides_some(query, key, key_end)) {
      attend<T, D, true>(out, softmax, kept, own, k_buffer(i), v_buffer(i), p.visibility, query, key, factor);
    } else {
      attend<T, D, false>(out, softmax, kept, own, k_buffer(i), v_buffer(i), p.visibility, query, key, factor);
    }
  }
  if (!active) return;

  softmax.finish();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = softmax.sum[m][half];
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        out[m][d][2 * half] *= inverse;
        out[m][d][2 * half + 1] *= inverse;
      }
      const int row = query + 16 * m + 8 * half + lane_index() / 4;
      if (lane_index() % 4 == 0 && row < p.queries) {
        global_store(p.lse + (batch * p.heads + head) * p.queries + row, softmax.largest[m][half] * p.scale + logf(sum));
      }
    }
  }
  warp_sync();  // the warp's queries are read for the last time: their place takes the results
  store_to_tile<T, D>(own, out);
  warp_sync();
  tile_to_global<16 * kM, D>(own, HeadRows(p.out, batch, head, query, p.queries));
}

template <class T, int D>
void start(const Attention& a, View out, float* lse, void* stream) {
  Params p{};
  p.q = a.q, p.k = a.k, p.v = a.v, p.prompt_k = a.prompt_k, p.prompt_v = a.prompt_v, p.out = out;
  p.lse = lse;
  p.heads = a.heads, p.queries = a.queries;
  p.query_blocks = (a.queries + kQueries - 1) / kQueries;
  p.visibility = {a.tokens, a.tokens + a.prompts, a.causal};
  p.scale = a.scale;
  launch(forward_kernel<T, D>, a.batch * a.heads * p.query_blocks, kThreads, kSharedBytes<D>, stream, p);
}

template <class T>
void choose(const Attention& a, View out, float* lse, void* stream) {
  switch (a.head_dim) {
    case 32: return start<T, 32>(a, out, lse, stream);
    case 64: return start<T, 64>(a, out, lse, stream);
    case 80: return start<T, 80>(a, out, lse, stream);
    case 96: return start<T, 96>(a, out, lse, stream);
    default: return start<T, 128>(a, out, lse, stream);
  }
}

}  // namespace

void prompt_attention_forward(const Attention& a, View out, float* lse, void* stream) {
  a.element == Element::kBf16 ? choose<Bf16>(a, out, lse, stream) : choose<Fp16>(a, out, lse, stream);
}

}  // namespace fastpeft
