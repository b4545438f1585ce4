// Fused attention of few queries, as in decoding, where to read k and v is what takes time: blocks share the keys.
//
//   of each part of the keys   out_n, lse_n
//   lse = log(sum(exp(lse_n))),   out = sum(exp(lse_n - lse) out_n),   a sink being one more lse_n, of no out_n
//
// The rows of a tile are the queries of all heads that read a kv head, whose keys are so read once. A warp has keys of
// its own, every WARPS-th sixteen of a split, and waits for no other until they are done. Which keys they are follows
// from split_keys and their number: a member has the same bits in any batch with splits as long, for empty ones add 0.
// Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023.
#pragma once

#include "cuda/finite.cuh"
#include "cuda/scores.cuh"
#include "cuda/softmax.cuh"

template <class T_, int D_, int WARPS_>
struct SplitConfig {
  using T = T_;
  static constexpr int D = D_, N = 16, WARPS = WARPS_, kThreads = WARPS * 32;
  static constexpr int kQuery = 16 * D * kBytes<T>, kKey = N * D * kBytes<T>, kWarp = 4 * kKey + N * 4;
  static constexpr int kShared = kQuery + WARPS * kWarp;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture from sm_80 on");
  static_assert(16 * (D + 1) * 4 <= kWarp, "what a warp finds takes the place of its keys");
};

// ROWS rows, of which row_at(row) tells the place, by threads of which this one is number `thread`; those outside
// [first, last), and columns from `columns` on, become 0.
template <class T, int D, int ROWS, int THREADS, class Place>
DEVICE void gather_tile(char* tile, const View& x, int thread, int first, int last, int columns, Place&& row_at) {
  constexpr int kChunks = D / kPerChunk<T>;
  const bool whole = is_aligned<T>(x);
  for (int i = thread; i < ROWS * kChunks; i += THREADS) {
    const int row = i / kChunks, chunk = i % kChunks, begin = chunk * kPerChunk<T>;
    const int count = row >= first && row < last ? int(clamp(columns - begin, 0, kPerChunk<T>)) : 0;
    char* const to = tile + place<T, D>(row, chunk);
    const char* const from = count ? row_at(row) + begin * x.dim : x.data;
    if (whole)
      copy16(to, from, count * kBytes<T>);
    else
      store_shared(to, gather<T>(from, x.dim, count));
  }
}

// Adds up the parts that lse_of(n) tells of, n = first, first + step, ...
template <class Lse>
DEVICE float merge(int first, int parts, int step, Lse&& lse_of) {
  float highest = -infinity(), sum = 0.0f;
  for (int n = first; n < parts; n += step) highest = fmaxf(highest, lse_of(n));
  const float pivot = highest == -infinity() ? 0.0f : highest;
  for (int n = first; n < parts; n += step) sum += power_of_2((lse_of(n) - pivot) * kLog2E);
  return sum == 0.0f ? highest : pivot + logf(sum);
}

// Of a part in the whole; 0 of one without keys, also where the whole has none.
DEVICE float share(float part, float whole) { return part == -infinity() ? 0.0f : power_of_2((part - whole) * kLog2E); }

template <class C>
KERNEL(C::kThreads)
split_kernel(ARGUMENT AttentionParams p) {
  using T = typename C::T;
  constexpr int D = C::D, N = C::N, WARPS = C::WARPS;
  SHARED(memory);
  char *const q_tile = memory, *const own = memory + C::kQuery + warp_index() * C::kWarp;
  int* const broken = reinterpret_cast<int*>(own + 4 * C::kKey);
  const int lane = int(lane_index());

  const int64_t splits = (p.seqlen_k + p.split_keys - 1) / p.split_keys, group = p.heads / p.kv_heads;
  const int64_t all = group * p.seqlen_q, tiles = (all + 15) / 16;
  int64_t block = block_index();
  const int64_t split = block % splits, tile = block / splits % tiles;
  block /= splits * tiles;
  const int64_t kv_head = block % p.kv_heads, batch = block / p.kv_heads;
  const Visibility sees = visibility(p, member_of(p, batch));
  const Band band(sees, 0);
  const Interval keys = sees.keys_of_any({0, p.seqlen_q}).intersect({split * p.split_keys, (split + 1) * p.split_keys});

  // Rows past the last are the last once more, which nobody stores.
  const auto number_of = [&](int row) { return smaller(tile * 16 + row, all - 1); };
  const auto head_of = [&](int64_t number) { return kv_head * group + number / p.seqlen_q; };
  const auto key_row = [&](const View& x, int64_t key) -> const char* {
    if (!p.page_table) return row_of(x, batch, kv_head, key);
    const int64_t at = batch * p.page_table_batch + key / p.page_size;
    const int64_t page = clamp(load_global<int32_t>(p.page_table + at), 0, p.pages - 1);
    return row_of(x, page, kv_head, key % p.page_size);
  };
  // k and v of 16 keys, into one of two stages.
  const auto load_keys = [&](int start_n) {
    if (start_n < keys.hi) {
      char* const k_tile = own + start_n / N / WARPS % 2 * 2 * C::kKey;
      const int first = band.start - start_n, last = band.end - start_n;
      gather_tile<T, D, N, 32>(k_tile, p.k, lane, first, last, int(p.head_dim),
                               [&](int row) { return key_row(p.k, start_n + row); });
      gather_tile<T, D, N, 32>(k_tile + C::kKey, p.v, lane, first, last, int(p.head_dim_v),
                               [&](int row) { return key_row(p.v, start_n + row); });
    }
    commit_copies();
  };
  const int tile_n = int(keys.lo / N), begin = (tile_n + (warp_index() + WARPS - tile_n % WARPS) % WARPS) * N;
  gather_tile<T, D, 16, C::kThreads>(q_tile, p.q, int(thread_index()), 0, 16, int(p.head_dim), [&](int row) {
    const int64_t number = number_of(row);
    return static_cast<const char*>(row_of(p.q, batch, head_of(number), number % p.seqlen_q));
  });
  if (!keys.empty()) load_keys(begin);
  commit_copies();
  wait_copies<0>();
  sync_block();  // q is there

  const int query[2] = {int(number_of(fragment_row(0)) % p.seqlen_q), int(number_of(fragment_row(1)) % p.seqlen_q)};
  const PairOptions options[2] = {PairOptions(p, sees, batch, head_of(number_of(fragment_row(0)))),
                                  PairOptions(p, sees, batch, head_of(number_of(fragment_row(1))))};
  float acc[1][D / 8][4];
  clear(acc);
  OnlineSoftmax<1, true> softmax(kLog2E);
  int poisoned = 0;
  for (int start_n = begin; start_n < keys.hi; start_n += WARPS * N) {
    load_keys(start_n + WARPS * N);
    wait_copies<1>();
    sync_warp();
    char *const k_tile = own + start_n / N / WARPS % 2 * 2 * C::kKey, *const v_tile = k_tile + C::kKey;
    float x[1][N / 8][4];
    clear(x);
    add_transposed_product<T, D, N, 1>(x, q_tile, 0, k_tile);
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        x[0][i][e] = options[e / 2].score(x[0][i][e], band, query[e / 2], start_n + fragment_column(i, e));
    if (!band.is_full(start_n, N, int(p.seqlen_q)) || options[0].hide_pairs()) {
      int found = finds_broken<T, D, N, 32>(v_tile, lane);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) found |= shuffle_xor(found, lanes);
      if (found) {
        sync_warp();
        mend_rows<T, D, N>(v_tile, broken, lane);
        sync_warp();
        find_poisoned(x[0], broken, 0, poisoned);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float rescale = softmax.update(0, r, x[0]);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) acc[0][i][2 * r] *= rescale, acc[0][i][2 * r + 1] *= rescale;
    }
    add_product<T, D, N, 1>(acc, x, v_tile);
    sync_warp();  // no lane reads this stage any more
  }

  poisoned |= shuffle_xor(poisoned, 1);
  poisoned |= shuffle_xor(poisoned, 2);
  char* const found = own;  // 16 rows of D floats, and their lse
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float lse = softmax.finish(0, r);
    const float factor = poisoned >> r & 1 ? not_a_number() : 1.0f / softmax.row_sum[0][r];
    if (lane % 4 == 0) store_shared(found + (16 * D + fragment_row(r)) * 4, lse);
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        store_shared(found + (fragment_row(r) * D + fragment_column(i, c)) * 4, acc[0][i][2 * r + c] * factor);
  }
  sync_block();
  const auto of_warp = [&](int warp, int at) {
    return load_shared<float>(memory + C::kQuery + warp * C::kWarp + at * 4);
  };
  const int columns = int(p.head_dim_v);
  for (int i = int(thread_index()); i < 16 * columns; i += C::kThreads) {
    const int row = i / columns, column = i % columns;
    const int64_t number = tile * 16 + row;
    if (number >= all) break;
    const float lse = merge(0, WARPS, 1, [&](int warp) { return of_warp(warp, 16 * D + row); });
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp)
      sum += share(of_warp(warp, 16 * D + row), lse) * of_warp(warp, row * D + column);
    const int64_t at = ((split * p.batch + batch) * p.heads + head_of(number)) * p.seqlen_q + number % p.seqlen_q;
    store_global(p.split_out + at * columns + column, sum);
    if (column == 0) store_global(p.split_lse + at, lse);
  }
}

constexpr int kCombineThreads = 128;

struct CombineConfig {
  static constexpr int kThreads = kCombineThreads, kShared = 0;
};

// A warp adds up one row.
template <class T>
KERNEL(kCombineThreads)
combine_kernel(ARGUMENT AttentionParams p) {
  const int64_t rows = p.batch * p.heads * p.seqlen_q, row = block_index() * (kCombineThreads / 32) + warp_index();
  if (row >= rows) return;
  const int64_t batch = row / p.seqlen_q / p.heads, head = row / p.seqlen_q % p.heads, query = row % p.seqlen_q;
  const int splits = int((p.seqlen_k + p.split_keys - 1) / p.split_keys), lane = int(lane_index());
  const auto lse_of = [&](int n) { return load_global<float>(p.split_lse + n * rows + row); };
  float lse = merge(lane, splits, 32, lse_of);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = shuffle_xor(lse, lanes);
    lse = merge(0, 2, 1, [&](int n) { return n ? other : lse; });
  }
  if (p.sinks) {
    const float sink = load_global<float>(static_cast<const float*>(p.sinks) + head);
    lse = merge(0, 2, 1, [&](int n) { return n ? sink : lse; });
  }
  char* const to = row_of(p.out, batch, head, query);
  for (int64_t column = lane; column < p.head_dim_v; column += 32) {
    float sum = 0.0f;
    for (int n = 0; n < splits; ++n)
      sum += share(lse_of(n), lse) * load_global<float>(p.split_out + (n * rows + row) * p.head_dim_v + column);
    store_real(T(), to + column * p.out.dim, sum);
  }
  if (lane == 0) store_global(static_cast<float*>(p.lse) + batch * p.lse_batch + head * p.lse_head + query, lse);
}
