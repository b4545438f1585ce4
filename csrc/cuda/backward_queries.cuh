// Fused attention, backward, the gradient of queries: dq = scale ds k.
//
// A block owns M queries of a head and visits the keys that they see, as the forward does.
// Source: Dao, "FlashAttention-2", 2023, algorithm 2.
#pragma once

#include "cuda/differentiate.cuh"

template <class T_, int D_, int M_, int N_, bool OPTIONS_>
struct QueryConfig {
  using T = T_;
  static constexpr int D = D_, M = M_, N = N_, kThreads = M / 16 * 32;
  static constexpr bool OPTIONS = OPTIONS_;
  static constexpr int kQuery = M * D * 2, kKey = N * D * 2, kShared = 2 * kQuery + 4 * kKey + N * 4;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture from sm_80 on");
};

template <class C>
KERNEL(C::kThreads)
query_kernel(ARGUMENT AttentionParams p) {
  using T = typename C::T;
  constexpr int D = C::D, M = C::M, N = C::N, kThreads = C::kThreads;
  constexpr bool OPTIONS = C::OPTIONS;
  SHARED(memory);
  char *const q_tile = memory, *const dout_tile = memory + C::kQuery, *const stages = dout_tile + C::kQuery;
  int* const broken = reinterpret_cast<int*>(stages + 4 * C::kKey);

  const Work work = query_work<M>(p);
  const Member& member = work.member;
  if (work.start >= member.seqlen_q) return;
  const int rows = int(smaller(M, member.seqlen_q - work.start)), first_row = warp_index() * 16;
  const Visibility sees = visibility(p, member);
  const Interval seen = sees.keys_of_any({work.start, work.start + rows});
  const Band band(sees, work.start);
  const int64_t kv_head = work.head / (p.heads / p.kv_heads);
  const int begin = int(seen.lo / N * N), end = seen.empty() ? begin : int(seen.hi);

  // k and v from start_n on, into one of two stages.
  const auto load_keys = [&](int start_n) {
    if (start_n < end) {
      char* const k_tile = stages + (start_n - begin) / N % 2 * 2 * C::kKey;
      const int first = band.start - start_n, last = band.end - start_n;
      load_tile<D, N, kThreads, OPTIONS>(k_tile, p.k, row_of(p.k, member.batch, kv_head, member.first_k + start_n),
                                         first, last, int(p.head_dim));
      load_tile<D, N, kThreads, OPTIONS>(k_tile + C::kKey, p.v,
                                         row_of(p.v, member.batch, kv_head, member.first_k + start_n), first, last,
                                         int(p.head_dim_v));
    }
    commit_copies();
  };
  float dq[1][D / 8][4];
  clear(dq);
  RowGradient row[2];
  if (begin < end) {
    const int64_t number = row_number(p, member, work.head) + work.start;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + fragment_row(r);
      if (query < rows)
        row[r] =
            RowGradient(static_cast<const float*>(p.lse) + number, static_cast<const float*>(p.delta) + number, query);
    }
    const int64_t place = member.first_q + work.start;
    load_tile<D, M, kThreads, OPTIONS>(q_tile, p.q, row_of(p.q, member.batch, work.head, place), 0, rows,
                                       int(p.head_dim));
    load_tile<D, M, kThreads, OPTIONS>(dout_tile, p.dout, row_of(p.dout, member.batch, work.head, place), 0, rows,
                                       int(p.head_dim_v));
    load_keys(begin);
  }
  const PairOptions options(p, sees, member.batch, work.head);
  const float unit = OPTIONS ? kLog2E : float(p.scale) * kLog2E;
  for (int start_n = begin; start_n < end; start_n += N) {
    load_keys(start_n + N);
    wait_copies<1>();
    sync_block();
    char *const k_tile = stages + (start_n - begin) / N % 2 * 2 * C::kKey, *const v_tile = k_tile + C::kKey;
    float x[1][N / 8][4], dp[1][N / 8][4], steep[N / 8][4];
    clear(x), clear(dp);
    add_transposed_product<T, D, N, 1>(x, q_tile, first_row, k_tile);
    add_transposed_product<T, D, N, 1>(dp, dout_tile, first_row, v_tile);
    const bool masked = !band.is_full(start_n, N, rows) || (OPTIONS && options.hide_pairs());
    if (OPTIONS) {
      options.steepness(x[0], steep);
      options.apply(x[0], band, work.start, rows, first_row, start_n);
    } else if (masked) {
      hide(x[0], band, first_row, start_n);
    }
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float d = dp[0][i][e];
        if (OPTIONS && p.dropout_seed) {
          const int64_t query = work.start + first_row + fragment_row(e / 2);
          const bool keeps = Dropout(p, member.batch, work.head).keeps(query, start_n + fragment_column(i, e));
          d *= keeps ? float(p.dropout_scale) : 0.0f;
        }
        d = row[e / 2].score_gradient(row[e / 2].template probability<OPTIONS>(x[0][i][e], unit), d);
        dp[0][i][e] = OPTIONS && d != 0.0f ? d * steep[i][e] : d;
      }
    if (masked && any_broken<T, D, N, kThreads>(k_tile)) {
      mend_rows<T, D, N>(k_tile, broken);
      sync_block();
    }
    add_product<T, D, N, 1>(dq, dp, k_tile);
    sync_block();  // nobody reads this stage any more
  }

  const float scale[2] = {float(p.scale), float(p.scale)};
  char* const to = row_of(p.dq, member.batch, work.head, member.first_q + work.start);
  store_rows<T, D, OPTIONS>(p.dq, to, q_tile, first_row, rows, int(p.head_dim), dq[0], scale);
}
