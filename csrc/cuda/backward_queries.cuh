// Fused attention, backward, the gradient of queries, and what each of them adds to that of its ALiBi slope.
//
//   dq = scale ds k,   dslope = -sum(ds |i + offset - j|)
//
// A block owns M queries of a head and visits the keys that they see, as the forward does.
// Source: Dao, "FlashAttention-2", 2023, algorithm 2.
#pragma once

#include "cuda/backward_slopes.cuh"

template <class T_, int D_, int M_, int N_, int STAGES_, bool OPTIONS_>
struct QueryConfig {
  using T = T_;
  static constexpr int D = D_, M = M_, N = N_, STAGES = STAGES_, kThreads = M / 16 * 32;
  static constexpr bool OPTIONS = OPTIONS_;
  static constexpr int kQuery = M * D * kBytes<T>, kKey = N * D * kBytes<T>,
                       kShared = 2 * kQuery + 2 * STAGES * kKey + N * 4;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture from sm_80 on");
};

template <class C>
KERNEL(C::kThreads)
query_kernel(ARGUMENT AttentionParams p) {
  using T = typename C::T;
  constexpr int D = C::D, M = C::M, N = C::N, kThreads = C::kThreads, STAGES = C::STAGES;
  constexpr bool OPTIONS = C::OPTIONS;
  SHARED(memory);
  char *const q_tile = memory, *const dout_tile = memory + C::kQuery, *const stages = dout_tile + C::kQuery;
  int* const broken = reinterpret_cast<int*>(stages + 2 * STAGES * C::kKey);

  const Work work = query_work<M>(p);
  const Member& member = work.member;
  if (work.start >= member.seqlen_q) return;
  const int rows = int(smaller(M, member.seqlen_q - work.start)), first_row = warp_index() * 16;
  const Visibility sees = visibility(p, member);
  const Interval seen = sees.keys_of_any({work.start, work.start + rows});
  const Band band(sees, work.start);
  const int64_t kv_head = work.head / (p.heads / p.kv_heads);
  const int begin = int(seen.lo / N * N), end = seen.empty() ? begin : int(seen.hi);

  // k and v from start_n on, into their stage.
  const auto load_keys = [&](int start_n) {
    if (start_n < end) {
      char* const k_tile = stages + (start_n - begin) / N % STAGES * 2 * C::kKey;
      const int first = band.start - start_n, last = band.end - start_n;
      load_tile<T, D, N, kThreads, OPTIONS>(k_tile, p.k, row_of(p.k, member.batch, kv_head, member.first_k + start_n),
                                            first, last, int(p.head_dim));
      load_tile<T, D, N, kThreads, OPTIONS>(k_tile + C::kKey, p.v,
                                            row_of(p.v, member.batch, kv_head, member.first_k + start_n), first, last,
                                            int(p.head_dim_v));
    }
    commit_copies();
  };
  float dq[1][D / 8][4];
  clear(dq);
  const int64_t number = row_number(p, member, work.head) + work.start;
  const OwnRows own(static_cast<const float*>(p.lse) + number, static_cast<const float*>(p.delta) + number, first_row,
                    rows);
  if (begin < end) {
    const int64_t place = member.first_q + work.start;
    load_tile<T, D, M, kThreads, OPTIONS>(q_tile, p.q, row_of(p.q, member.batch, work.head, place), 0, rows,
                                          int(p.head_dim));
    load_tile<T, D, M, kThreads, OPTIONS>(dout_tile, p.dout, row_of(p.dout, member.batch, work.head, place), 0, rows,
                                          int(p.head_dim_v));
    load_keys(begin);
  }
  const PairOptions options(p, sees, member.batch, work.head);
  const float unit = OPTIONS ? kLog2E : float(p.scale) * kLog2E;
  float dslopes[2] = {0.0f, 0.0f};
  for (int start_n = begin; start_n < end; start_n += N) {
    if (STAGES == 2) load_keys(start_n + N);
    wait_copies<STAGES - 1>();
    sync_block();
    char *const k_tile = stages + (start_n - begin) / N % STAGES * 2 * C::kKey, *const v_tile = k_tile + C::kKey;
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
    differentiate<false, OPTIONS>(x[0], dp[0], own, unit, Dropout(p, member.batch, work.head), work.start + first_row,
                                  start_n);
    if (OPTIONS && p.row_dslopes) options.add_slope_gradient(dslopes, dp[0], work.start, first_row, start_n);
    if (OPTIONS) unbend(dp[0], steep);
    if (masked && any_broken<T, D, N, kThreads>(k_tile)) {
      mend_rows<T, D, N>(k_tile, broken, int(thread_index()));
      sync_block();
    }
    add_product<T, D, N, 1>(dq, dp, k_tile);
    sync_block();  // nobody reads this stage any more
    if (STAGES == 1) load_keys(start_n + N);
  }

  const float scale[2] = {float(p.scale), float(p.scale)};
  char* const to = row_of(p.dq, member.batch, work.head, member.first_q + work.start);
  if (OPTIONS && p.row_dslopes)
    store_slope_gradients(static_cast<float*>(p.row_dslopes) + number, dslopes, first_row, rows);
  store_rows<T, D, OPTIONS>(p.dq, to, q_tile, first_row, rows, int(p.head_dim), dq[0], scale);
}
