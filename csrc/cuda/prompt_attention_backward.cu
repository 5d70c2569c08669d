// Attention over tokens and prompts, backward. With P = exp(scale * q k^T - lse) and delta = rowsum(dout * out):
//
//   dv = P^T dout,   dS = P * (dout v^T - delta),   dq = scale * dS k,   dk = scale * dS^T q
//
// Four kernels, none of which adds into what another block writes, so that a result is the same in every run:
//
//   statistics_kernel      lse in powers of two, and delta, a pair of numbers a query
//   query_gradient_kernel  dq: a block has 64 or 128 queries, the keys pass by
//   key_gradient_kernel    dk and dv: a block has up to 128 keys (tokens, or prompts, or both), the queries pass by. It
//                          computes S^T = k q^T, so that P^T and dS^T come out as left factors (mma.cuh)
//   prompt_sum_kernel      gradients of prompts that the batch shares: key_gradient_kernel lets the queries of several
//                          samples pass by and leaves a sum in fp32; those sums are added here in a fixed order

#include "attention.cuh"

namespace fastpeft {
namespace {

// ---- Statistics ----

constexpr int kLanesARow = 16;
constexpr int kStatisticsRows = kThreads / kLanesARow;

struct StatisticsParams {
  View dout, out;
  const float* lse;   // (batch, heads, queries)
  float* statistics;  // (batch, heads, queries, 2): lse * log2(e), delta
  int heads, queries;
  int64_t rows;
};

template <class T, int D>
FASTPEFT_KERNEL(kThreads, 8)
statistics_kernel(const StatisticsParams p) {
  // Heads change fastest, as they do in memory.
  const int64_t row = block_index() * kStatisticsRows + thread_index() / kLanesARow;
  const int piece = thread_index() % kLanesARow;
  const int head = static_cast<int>(row % p.heads);
  const int64_t batch = row / p.heads / p.queries, query = row / p.heads % p.queries;
  float delta = 0.0f;
  if (row < p.rows && piece < D / 8) {
    const auto a = global_load<Word4>(head_of(p.dout, batch, head) + query * p.dout.row + 8 * piece);
    const auto b = global_load<Word4>(head_of(p.out, batch, head) + query * p.out.row + 8 * piece);
    const uint32_t words[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Float2 left = unpack<T>(words[0][i]), right = unpack<T>(words[1][i]);
      delta += left.x * right.x + left.y * right.y;
    }
  }
#pragma unroll
  for (int mask = kLanesARow / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  if (row < p.rows && piece == 0) {
    const int64_t index = (batch * p.heads + head) * p.queries + query;
    global_store(p.statistics + 2 * index, Float2{global_load<float>(p.lse + index) * kLog2E, delta});
  }
}

// ---- Gradient of the queries ----

template <int D>
struct QueryTiling {
  static constexpr int kM = D <= 96 ? 2 : 1;       // blocks of 16 queries a warp
  static constexpr int kQueries = 16 * kM * kWarps;
  static constexpr int kKeys = D <= 64 ? 64 : 32;  // a tile
  static constexpr int kAtOnce = D <= 64 ? 32 : 16;  // keys whose scores are in registers
  static constexpr int kSharedBytes = kTileBytes<2 * kQueries + 4 * kKeys, D>;
};

struct QueryParams {
  View q, k, v, prompt_k, prompt_v, dout, dq;
  const float* statistics;
  int heads, queries, query_blocks;
  Visibility visibility;
  float scale;
};

template <class T, int D>
FASTPEFT_KERNEL(kThreads, 2)
query_gradient_kernel(const QueryParams p) {
  using Tiling = QueryTiling<D>;
  constexpr int kM = Tiling::kM, kQueries = Tiling::kQueries, kKeys = Tiling::kKeys, kAtOnce = Tiling::kAtOnce;
  const int64_t index = block_index();
  const int block = static_cast<int>(index % p.query_blocks);
  const int head = static_cast<int>(index / p.query_blocks % p.heads);
  const int64_t batch = index / p.query_blocks / p.heads;
  const int first = block * kQueries;
  const int warp_first = 16 * kM * warp_index();
  const int query = first + warp_first;
  const bool active = query < p.queries;
  const KeyTiles<kKeys> tiles(p.visibility, least(first + kQueries, p.queries));
  const float factor = p.scale * kLog2E;

  const Shared q = shared_memory();
  const Shared dout = q + kTileBytes<kQueries, D>;
  const Shared buffers = dout + kTileBytes<kQueries, D>;
  const auto k_buffer = [&](int i) { return buffers + (i % 2) * kTileBytes<2 * kKeys, D>; };
  const auto v_buffer = [&](int i) { return k_buffer(i) + kTileBytes<kKeys, D>; };
  const auto start_tile = [&](int i) {
    const int key = tiles(i), tokens = p.visibility.tokens, keys = p.visibility.keys;
    copy_tile<kKeys, D, kThreads>(k_buffer(i), KeyRows(p.k, p.prompt_k, batch, head, tokens, key, keys));
    copy_tile<kKeys, D, kThreads>(v_buffer(i), KeyRows(p.v, p.prompt_v, batch, head, tokens, key, keys));
    copy_commit();
  };

  copy_tile<kQueries, D, kThreads>(q, HeadRows(p.q, batch, head, first, p.queries));
  copy_tile<kQueries, D, kThreads>(dout, HeadRows(p.dout, batch, head, first, p.queries));
  start_tile(0);

  // Queries behind the last are rows of zeros with statistics of zero: what they compute is finite and not stored.
  Float2 statistics[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 16 * m + 8 * half + lane_index() / 4;
      statistics[m][half] = {0.0f, 0.0f};
      if (row < p.queries) {
        statistics[m][half] = global_load<Float2>(p.statistics + 2 * ((batch * p.heads + head) * p.queries + row));
      }
    }
  }

  float dq[kM][D / 8][4];
  clear(dq);
  const Shared own_q = lane_of_rows<D>(q + warp_first * kPitch<D>);
  const Shared own_dout = lane_of_rows<D>(dout + warp_first * kPitch<D>);
  for (int i = 0; i < tiles.count; ++i) {
    copy_wait<0>();
    block_sync();  // the tile is there for all, and nobody reads the one before it any more
    if (i + 1 < tiles.count) start_tile(i + 1);
    if (!active) continue;
#pragma unroll 1
    for (int at = 0; at < kKeys; at += kAtOnce) {
      const int key = tiles(i) + at;
      if (key >= p.visibility.keys) break;
      if (p.visibility.hides_all(query + 16 * kM, key, key + kAtOnce)) continue;
      const Shared k = k_buffer(i) + at * kPitch<D>, v = v_buffer(i) + at * kPitch<D>;
      float s[kM][kAtOnce / 8][4], dp[kM][kAtOnce / 8][4];
      clear(s);
      multiply_transposed<T, D, kM, kAtOnce / 16>(s, own_q, lane_of_columns<D>(k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kAtOnce / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] = exp2_fast(s[m][n][e] * factor - statistics[m][e / 2].x);
        }
      }
      if (p.visibility.hides_some(query, key, key + kAtOnce)) {
        const int row = query + lane_index() / 4, column = key + lane_index() % 4 * 2;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kAtOnce / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if (!p.visibility.sees(row + 16 * m + e / 2 * 8, column + 8 * n + e % 2)) s[m][n][e] = 0.0f;
            }
          }
        }
      }
      clear(dp);
      multiply_transposed<T, D, kM, kAtOnce / 16>(dp, own_dout, lane_of_columns<D>(v));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kAtOnce / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] *= dp[m][n][e] - statistics[m][e / 2].y;
        }
      }
#pragma unroll
      for (int g = 0; g < kAtOnce / 16; ++g) {
        uint32_t ds[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) pack_left<T>(ds[m], s[m][2 * g], s[m][2 * g + 1]);
        multiply_block<T, D, kPitch<D>>(dq, ds, lane_of_rows<D>(k) + g * 16 * kPitch<D>);
      }
    }
  }
  if (!active) return;

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[m][d][e] *= p.scale;
    }
  }
  warp_sync();  // the warp's queries are read for the last time: their place takes the results
  store_to_tile<T, D>(q + warp_first * kPitch<D>, dq);
  warp_sync();
  tile_to_global<16 * kM, D>(q + warp_first * kPitch<D>, HeadRows(p.dq, batch, head, query, p.queries));
}

// ---- Gradients of keys and values ----

template <int D>
struct KeyTiling {
  static constexpr int kM = D <= 80 ? 2 : 1;  // blocks of 16 keys a warp
  static constexpr int kKeys = 16 * kM * kWarps;
  static constexpr int kQueries = D <= 64 ? 64 : 32;  // a tile
  static constexpr int kAtOnce = 16;                  // queries whose scores are in registers
  static constexpr int kStatisticsBytes = 8 * kQueries;
  static constexpr int kBufferBytes = kTileBytes<2 * kQueries, D> + kStatisticsBytes;
  static constexpr int kSharedBytes = kTileBytes<2 * kKeys, D> + 2 * kBufferBytes;
};

struct KeyParams {
  View q, k, v, prompt_k, prompt_v, dout;
  const float* statistics;
  // Where results go; or sums over a group's samples in (groups, heads, prompts, D), if those are not null.
  View dk, dv, dprompt_k, dprompt_v;
  float *partial_k, *partial_v;
  // Keys first..last - 1, tokens and prompts counted together. A block has 16 M keys for each of its `warps_on_keys`
  // groups of warps (1, 2 or 4); the warps of such a group take turns at the queries.
  int first, last, key_blocks, warps_on_keys;
  // A block lets the queries of so many samples pass by.
  int samples;
  int64_t batch;
  int heads, queries;
  Visibility visibility;
  float scale;
  bool need_k, need_v;
};

// Adds up what the warps that took turns have, in the order of their numbers, into those of the first turn. All warps of
// the block come here; `scratch` is free to use.
template <int M, int N>
FASTPEFT_DEVICE void add_turns(float (&c)[M][N][4], Shared scratch, int turn, int turns, int group, int groups) {
  const auto place = [&](int turn, int m, int n) {
    return scratch + ((((turn - 1) * groups + group) * M + m) * N + n) * (16 * kWarp) + 16 * lane_index();
  };
  block_sync();
  if (turn > 0) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        shared_store(place(turn, m, n), Float4{c[m][n][0], c[m][n][1], c[m][n][2], c[m][n][3]});
      }
    }
  }
  block_sync();
  if (turn > 0) return;
  for (int other = 1; other < turns; ++other) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Float4 more = shared_load_float4(place(other, m, n));
        c[m][n][0] += more.x, c[m][n][1] += more.y, c[m][n][2] += more.z, c[m][n][3] += more.w;
      }
    }
  }
}

// Writes this warp's rows of one head as they are; `rows` of them are there.
template <int D, int M>
FASTPEFT_DEVICE void store_partial(float* to, const float (&c)[M][D / 8][4], int rows) {
  const int row = lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half;
      if (r >= rows) continue;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        global_store(to + static_cast<int64_t>(r) * D + 8 * d + column, Float2{c[m][d][2 * half], c[m][d][2 * half + 1]});
      }
    }
  }
}

template <class T, int D>
FASTPEFT_KERNEL(kThreads, 2)
key_gradient_kernel(const KeyParams p) {
  using Tiling = KeyTiling<D>;
  constexpr int kM = Tiling::kM, kKeys = Tiling::kKeys, kQueries = Tiling::kQueries, kAtOnce = Tiling::kAtOnce;
  const int64_t index = block_index();
  const int block = static_cast<int>(index % p.key_blocks);
  const int head = static_cast<int>(index / p.key_blocks % p.heads);
  const int64_t group = index / p.key_blocks / p.heads;
  const int64_t batch = group * p.samples;
  const int samples = static_cast<int>(p.batch - batch < p.samples ? p.batch - batch : p.samples);
  const int first = p.first + block * 16 * kM * p.warps_on_keys;
  const int last = least(first + 16 * kM * p.warps_on_keys, p.last);
  const int turn = warp_index() / p.warps_on_keys, turns = kWarps / p.warps_on_keys;
  const int place = warp_index() % p.warps_on_keys;
  const int warp_first = 16 * kM * place;
  const int key = first + warp_first;
  const bool active = key < last;
  const int tokens = p.visibility.tokens;
  const float factor = p.scale * kLog2E;

  // Tiles of queries a sample; the first ones see none of these keys if those are all tokens under a causal mask.
  const int skipped = p.visibility.causal && last <= tokens ? first / kQueries : 0;
  const int tiles = most((p.queries + kQueries - 1) / kQueries - skipped, 0);
  const int count = samples * tiles;

  const Shared k = shared_memory();
  const Shared v = k + kTileBytes<kKeys, D>;
  const Shared buffers = v + kTileBytes<kKeys, D>;
  const auto q_buffer = [&](int i) { return buffers + (i % 2) * Tiling::kBufferBytes; };
  const auto dout_buffer = [&](int i) { return q_buffer(i) + kTileBytes<kQueries, D>; };
  const auto statistics_buffer = [&](int i) { return dout_buffer(i) + kTileBytes<kQueries, D>; };
  const auto first_query = [&](int i) { return (skipped + i % tiles) * kQueries; };
  const auto start_tile = [&](int i) {
    const int64_t sample = batch + i / tiles;
    const int query = first_query(i);
    copy_tile<kQueries, D, kThreads>(q_buffer(i), HeadRows(p.q, sample, head, query, p.queries));
    copy_tile<kQueries, D, kThreads>(dout_buffer(i), HeadRows(p.dout, sample, head, query, p.queries));
    if (thread_index() < kQueries) {
      // Queries behind the last have rows and statistics of zero: they add nothing.
      const int row = query + thread_index();
      copy_async_8(statistics_buffer(i) + 8 * thread_index(),
                   p.statistics + 2 * ((sample * p.heads + head) * p.queries + row), row < p.queries);
    }
    copy_commit();
  };

  float dk[kM][D / 8][4], dv[kM][D / 8][4];
  clear(dk);
  clear(dv);
  if (count > 0) {
    copy_tile<kKeys, D, kThreads>(k, KeyRows(p.k, p.prompt_k, batch, head, tokens, first, last));
    copy_tile<kKeys, D, kThreads>(v, KeyRows(p.v, p.prompt_v, batch, head, tokens, first, last));
    start_tile(0);
  }
  const Shared own_k = lane_of_rows<D>(k + warp_first * kPitch<D>);
  const Shared own_v = lane_of_rows<D>(v + warp_first * kPitch<D>);
  for (int i = 0; i < count; ++i) {
    copy_wait<0>();
    block_sync();  // the tile is there for all, and nobody reads the one before it any more
    if (i + 1 < count) start_tile(i + 1);
    if (!active) continue;
#pragma unroll 1
    for (int at = turn * kAtOnce; at < kQueries; at += turns * kAtOnce) {
      const int query = first_query(i) + at;
      if (query >= p.queries) break;
      if (p.visibility.hides_all(query + kAtOnce, key, key + 16 * kM)) continue;
      const Shared q = q_buffer(i) + at * kPitch<D>, dout = dout_buffer(i) + at * kPitch<D>;
      // Rows are keys, columns are queries.
      float s[kM][kAtOnce / 8][4];
      clear(s);
      multiply_transposed<T, D, kM, kAtOnce / 16>(s, own_k, lane_of_columns<D>(q));
      const bool masked = p.visibility.hides_some(query, key, key + 16 * kM);
      float delta[kAtOnce / 8][2];
#pragma unroll
      for (int n = 0; n < kAtOnce / 8; ++n) {
        const int column = 8 * n + lane_index() % 4 * 2;
        const Float4 pair = shared_load_float4(statistics_buffer(i) + 8 * (at + column));
        const float lse[2] = {pair.x, pair.z};
        delta[n][0] = pair.y, delta[n][1] = pair.w;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            s[m][n][e] = exp2_fast(s[m][n][e] * factor - lse[e % 2]);
            const int row = key + 16 * m + e / 2 * 8 + lane_index() / 4;
            if (masked && !p.visibility.sees(query + column + e % 2, row)) s[m][n][e] = 0.0f;
          }
        }
      }
      if (p.need_v) {
#pragma unroll
        for (int g = 0; g < kAtOnce / 16; ++g) {
          uint32_t left[kM][4];
#pragma unroll
          for (int m = 0; m < kM; ++m) pack_left<T>(left[m], s[m][2 * g], s[m][2 * g + 1]);
          multiply_block<T, D, kPitch<D>>(dv, left, lane_of_rows<D>(dout) + g * 16 * kPitch<D>);
        }
      }
      if (p.need_k) {
        float dp[kM][kAtOnce / 8][4];
        clear(dp);
        multiply_transposed<T, D, kM, kAtOnce / 16>(dp, own_v, lane_of_columns<D>(dout));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kAtOnce / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[m][n][e] *= dp[m][n][e] - delta[n][e % 2];
          }
        }
#pragma unroll
        for (int g = 0; g < kAtOnce / 16; ++g) {
          uint32_t left[kM][4];
#pragma unroll
          for (int m = 0; m < kM; ++m) pack_left<T>(left[m], s[m][2 * g], s[m][2 * g + 1]);
          multiply_block<T, D, kPitch<D>>(dk, left, lane_of_rows<D>(q) + g * 16 * kPitch<D>);
        }
      }
    }
  }

  if (turns > 1) {
    if (p.need_v) add_turns(dv, k, turn, turns, place, p.warps_on_keys);
    if (p.need_k) add_turns(dk, k, turn, turns, place, p.warps_on_keys);
  }
  block_sync();  // nobody reads keys, values or what was added up any more
  if (turn > 0 || !active) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[m][d][e] *= p.scale;
    }
  }
  if (p.partial_k != nullptr || p.partial_v != nullptr) {
    const int64_t row = (group * p.heads + head) * (p.last - p.first) + (key - p.first);
    if (p.need_k) store_partial<D>(p.partial_k + row * D, dk, last - key);
    if (p.need_v) store_partial<D>(p.partial_v + row * D, dv, last - key);
    return;
  }
  const Shared k_rows = k + warp_first * kPitch<D>, v_rows = v + warp_first * kPitch<D>;
  if (p.need_k) store_to_tile<T, D>(k_rows, dk);
  if (p.need_v) store_to_tile<T, D>(v_rows, dv);
  warp_sync();
  if (p.need_k) tile_to_global<16 * kM, D>(k_rows, KeyRows(p.dk, p.dprompt_k, batch, head, tokens, key, last));
  if (p.need_v) tile_to_global<16 * kM, D>(v_rows, KeyRows(p.dv, p.dprompt_v, batch, head, tokens, key, last));
}

// ---- Sums of shared prompts' gradients ----

struct SumParams {
  const float* partial;  // (groups, heads, prompts, head_dim)
  View out;
  int groups, heads, prompts, head_dim;
};

template <class T>
FASTPEFT_KERNEL(kThreads, 8)
prompt_sum_kernel(const SumParams p) {
  const int64_t size = static_cast<int64_t>(p.heads) * p.prompts * p.head_dim;
  const int64_t index = 2 * (block_index() * kThreads + thread_index());
  if (index >= size) return;
  Float2 sum = {0.0f, 0.0f};
  for (int g = 0; g < p.groups; ++g) {
    const auto more = global_load<Float2>(p.partial + g * size + index);
    sum.x += more.x, sum.y += more.y;
  }
  const int column = static_cast<int>(index % p.head_dim);
  const int row = static_cast<int>(index / p.head_dim % p.prompts);
  const int head = static_cast<int>(index / p.head_dim / p.prompts);
  global_store(head_of(p.out, 0, head) + row * p.out.row + column, pack<T>(sum.x, sum.y));
}

// ---- Launches ----

int ceil_divide(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// How the keys first..last - 1 are shared out.
struct KeyPlan {
  int first, last, warps_on_keys, blocks;
  int groups = 0, samples = 1;  // of samples, where a block sums over them

  KeyPlan(int head_dim, int first, int last) : first(first), last(last) {
    const int rows = 16 * (head_dim <= 80 ? KeyTiling<80>::kM : KeyTiling<96>::kM);
    const int keys = last - first;
    warps_on_keys = keys <= rows ? 1 : keys <= 2 * rows ? 2 : kWarps;
    blocks = ceil_divide(keys, rows * warps_on_keys);
  }
};

// For prompts that the batch shares: enough groups of samples to occupy the processors.
KeyPlan shared_plan(const Attention& a, int processors) {
  KeyPlan plan(a.head_dim, a.tokens, a.tokens + a.prompts);
  const int64_t wanted = ceil_divide(4 * static_cast<int64_t>(processors), static_cast<int64_t>(a.heads) * plan.blocks);
  plan.samples = ceil_divide(a.batch, wanted < a.batch ? wanted : a.batch);
  plan.groups = ceil_divide(a.batch, plan.samples);
  return plan;
}

bool wants_shared_prompts(const Attention& a, const AttentionGradients& g) {
  return g.shared_prompts && a.prompts > 0 && (g.dprompt_k.data != nullptr || g.dprompt_v.data != nullptr);
}

int64_t statistics_size(const Attention& a) { return 2 * a.batch * a.heads * a.queries; }

int64_t partial_size(const Attention& a, const KeyPlan& plan) {
  return static_cast<int64_t>(plan.groups) * a.heads * a.prompts * a.head_dim;
}

template <class T, int D>
void start_keys(const Attention& a, const KeyParams& common, const KeyPlan& plan, bool need_k, bool need_v,
                float* partial_k, float* partial_v, void* stream) {
  if (plan.last <= plan.first || !(need_k || need_v)) return;
  KeyParams p = common;
  p.first = plan.first, p.last = plan.last, p.key_blocks = plan.blocks, p.warps_on_keys = plan.warps_on_keys;
  p.need_k = need_k, p.need_v = need_v;
  p.partial_k = partial_k, p.partial_v = partial_v;
  p.samples = plan.samples;
  const int64_t groups = plan.groups > 0 ? plan.groups : a.batch;
  launch(key_gradient_kernel<T, D>, groups * a.heads * plan.blocks, kThreads, KeyTiling<D>::kSharedBytes, stream, p);
}

template <class T>
void add_up(const Attention& a, const KeyPlan& plan, const float* partial, const View& out, void* stream) {
  const SumParams p{partial, out, plan.groups, a.heads, a.prompts, a.head_dim};
  const int64_t pairs = static_cast<int64_t>(a.heads) * a.prompts * a.head_dim / 2;
  launch(prompt_sum_kernel<T>, (pairs + kThreads - 1) / kThreads, kThreads, 0, stream, p);
}

template <class T, int D>
void start(const Attention& a, const AttentionGradients& g, void* stream) {
  const Visibility visibility{a.tokens, a.tokens + a.prompts, a.causal};
  const int64_t rows = a.batch * a.heads * a.queries;
  launch(statistics_kernel<T, D>, (rows + kStatisticsRows - 1) / kStatisticsRows, kThreads, 0, stream,
         StatisticsParams{g.dout, g.out, g.lse, g.workspace, a.heads, a.queries, rows});
  if (g.dq.data != nullptr) {
    const int blocks = ceil_divide(a.queries, QueryTiling<D>::kQueries);
    launch(query_gradient_kernel<T, D>, a.batch * a.heads * blocks, kThreads, QueryTiling<D>::kSharedBytes, stream,
           QueryParams{a.q, a.k, a.v, a.prompt_k, a.prompt_v, g.dout, g.dq, g.workspace, a.heads, a.queries, blocks,
                       visibility, a.scale});
  }

  KeyParams keys{};
  keys.q = a.q, keys.k = a.k, keys.v = a.v, keys.prompt_k = a.prompt_k, keys.prompt_v = a.prompt_v;
  keys.dout = g.dout, keys.statistics = g.workspace;
  keys.dk = g.dk, keys.dv = g.dv, keys.dprompt_k = g.dprompt_k, keys.dprompt_v = g.dprompt_v;
  keys.batch = a.batch, keys.heads = a.heads, keys.queries = a.queries;
  keys.visibility = visibility, keys.scale = a.scale;
  const bool dk = g.dk.data != nullptr, dv = g.dv.data != nullptr;
  const bool dprompt_k = g.dprompt_k.data != nullptr, dprompt_v = g.dprompt_v.data != nullptr;
  if (!g.shared_prompts && a.prompts > 0 && dk == dprompt_k && dv == dprompt_v) {
    start_keys<T, D>(a, keys, KeyPlan(D, 0, visibility.keys), dk, dv, nullptr, nullptr, stream);
    return;
  }
  start_keys<T, D>(a, keys, KeyPlan(D, 0, a.tokens), dk, dv, nullptr, nullptr, stream);
  if (wants_shared_prompts(a, g)) {
    const KeyPlan plan = shared_plan(a, g.processors);
    float* partial_k = g.workspace + statistics_size(a);
    float* partial_v = partial_k + partial_size(a, plan);
    start_keys<T, D>(a, keys, plan, dprompt_k, dprompt_v, partial_k, partial_v, stream);
    if (dprompt_k) add_up<T>(a, plan, partial_k, g.dprompt_k, stream);
    if (dprompt_v) add_up<T>(a, plan, partial_v, g.dprompt_v, stream);
  } else {
    start_keys<T, D>(a, keys, KeyPlan(D, a.tokens, visibility.keys), dprompt_k, dprompt_v, nullptr, nullptr, stream);
  }
}

template <class T>
void choose(const Attention& a, const AttentionGradients& g, void* stream) {
  switch (a.head_dim) {
    case 32: return start<T, 32>(a, g, stream);
    case 64: return start<T, 64>(a, g, stream);
    case 80: return start<T, 80>(a, g, stream);
    case 96: return start<T, 96>(a, g, stream);
    default: return start<T, 128>(a, g, stream);
  }
}

}  // namespace

int64_t prompt_attention_workspace(const Attention& a, const AttentionGradients& g) {
  const int64_t partials = wants_shared_prompts(a, g) ? 2 * partial_size(a, shared_plan(a, g.processors)) : 0;
  return statistics_size(a) + partials;
}

void prompt_attention_backward(const Attention& a, const AttentionGradients& g, void* stream) {
  a.element == Element::kBf16 ? choose<Bf16>(a, g, stream) : choose<Fp16>(a, g, stream);
}

}  // namespace fastpeft
