// Fused attention, forward: out = softmax(scores) v and the lse of each row, without ever storing the scores.
//
// A block computes M rows of one head, a warp 16 TILES of them. While k is multiplied v arrives, and the next k while v
// is. Source: Dao, "FlashAttention-2", 2023, algorithm 1.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/finite.cuh"
#include "cuda/schedule.cuh"
#include "cuda/scores.cuh"
#include "cuda/softmax.cuh"

// M queries and N keys at a time of at most D columns; OPTIONS: whatever shapes a score, and any layout of memory.
template <class T_, int D_, int M_, int N_, int WARPS, bool OPTIONS_>
struct ForwardConfig {
  using T = T_;
  static constexpr int D = D_, M = M_, N = N_, kThreads = WARPS * 32, kTiles = M / WARPS / 16;
  static constexpr bool OPTIONS = OPTIONS_;
  static constexpr int kQuery = M * D * kBytes<T>, kKey = N * D * kBytes<T>, kShared = kQuery + 2 * kKey + N * 4;
  static_assert(kTiles * WARPS * 16 == M && N % 16 == 0, "warps share the rows evenly");
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture from sm_80 on");
};

template <class C>
KERNEL(C::kThreads)
forward_kernel(ARGUMENT AttentionParams p) {
  using T = typename C::T;
  constexpr int D = C::D, M = C::M, N = C::N, kTiles = C::kTiles, kThreads = C::kThreads;
  constexpr bool OPTIONS = C::OPTIONS;
  SHARED(memory);
  char *const q_tile = memory, *const k_tile = memory + C::kQuery, *const v_tile = k_tile + C::kKey;
  int* const broken = reinterpret_cast<int*>(v_tile + C::kKey);

  const Work work = query_work<M>(p);
  const Member& member = work.member;
  if (work.start >= member.seqlen_q) return;
  const int rows = int(smaller(M, member.seqlen_q - work.start));
  const Visibility sees = visibility(p, member);
  const Interval keys = sees.keys_of_any({work.start, work.start + rows});
  const Band band(sees, work.start);
  const int64_t kv_head = work.head / (p.heads / p.kv_heads);
  const char* const k_rows = row_of(p.k, member.batch, kv_head, member.first_k);
  const char* const v_rows = row_of(p.v, member.batch, kv_head, member.first_k);
  const int first_row = warp_index() * kTiles * 16;  // of the warp, in the tile
  const auto load_keys = [&](char* tile, const View& x, const char* from, int start_n, int64_t columns) {
    load_tile<T, D, N, kThreads, OPTIONS>(tile, x, from + start_n * x.seq, band.start - start_n, band.end - start_n,
                                          int(columns));
  };

  float acc[kTiles][D / 8][4];
  clear(acc);
  OnlineSoftmax<kTiles, OPTIONS> softmax(OPTIONS ? kLog2E : float(p.scale) * kLog2E);
  const PairOptions options(p, sees, member.batch, work.head);
  if (OPTIONS && p.sinks) softmax.start_with(load_global<float>(static_cast<const float*>(p.sinks) + work.head));
  int poisoned = 0;  // rows that see a value which is not finite, a bit each

  const int begin = int(keys.lo / N * N), end = int(keys.hi);
  if (!keys.empty()) {
    const char* const from = row_of(p.q, member.batch, work.head, member.first_q + work.start);
    load_tile<T, D, M, kThreads, OPTIONS>(q_tile, p.q, from, 0, rows, int(p.head_dim));
    load_keys(k_tile, p.k, k_rows, begin, p.head_dim);
    commit_copies();
    for (int start_n = begin; start_n < end; start_n += N) {
      wait_copies<0>();
      sync_block();  // k is there, and nobody reads the last v any more
      load_keys(v_tile, p.v, v_rows, start_n, p.head_dim_v);
      commit_copies();
      float x[kTiles][N / 8][4];
      clear(x);
      add_transposed_product<T, D, N, kTiles>(x, q_tile, first_row, k_tile);
      wait_copies<0>();
      sync_block();  // v is there, and nobody reads this k any more
      if (start_n + N < end) load_keys(k_tile, p.k, k_rows, start_n + N, p.head_dim);
      commit_copies();

      const bool masked = !band.is_full(start_n, N, rows) || (OPTIONS && options.hide_pairs());
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (OPTIONS)
          options.apply(x[t], band, work.start, rows, first_row + t * 16, start_n);
        else if (masked)
          hide(x[t], band, first_row + t * 16, start_n);
      }
      if (masked && any_broken<T, D, N, kThreads>(v_tile)) {
        mend_rows<T, D, N>(v_tile, broken, int(thread_index()));
        sync_block();
#pragma unroll
        for (int t = 0; t < kTiles; ++t) find_poisoned(x[t], broken, t * 2, poisoned);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float rescale = softmax.update(t, r, x[t]);
#pragma unroll
          for (int i = 0; i < D / 8; ++i) acc[t][i][2 * r] *= rescale, acc[t][i][2 * r + 1] *= rescale;
        }
      }
      if (OPTIONS && p.dropout_seed) {
        const Dropout dropout(p, member.batch, work.head);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) dropout.drop(x[t], work.start + first_row + t * 16, start_n);
      }
      add_product<T, D, N, kTiles>(acc, x, v_tile);
    }
  }

  poisoned |= shuffle_xor(poisoned, 1);
  poisoned |= shuffle_xor(poisoned, 2);
  const float kept = OPTIONS && p.dropout_seed ? float(p.dropout_scale) : 1.0f;
  char* const to = row_of(p.out, member.batch, work.head, member.first_q + work.start);
  float* const lse =
      static_cast<float*>(p.lse) + member.batch * p.lse_batch + work.head * p.lse_head + member.first_q + work.start;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + t * 16 + fragment_row(r);
      const float row_lse = softmax.finish(t, r);
      if (lane_index() % 4 == 0 && row < rows) store_global(lse + row, row_lse);
      factor[r] = poisoned >> (t * 2 + r) & 1 ? not_a_number() : kept / softmax.row_sum[t][r];
    }
    store_rows<T, D, OPTIONS>(p.out, to, q_tile, first_row + t * 16, rows, int(p.head_dim_v), acc[t], factor);
  }
}
