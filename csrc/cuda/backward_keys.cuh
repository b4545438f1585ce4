// Fused attention, backward, the gradients of keys and values.
//
//   dv = dropout(p)^T dout,   dk = scale ds^T q
//
// A block owns N keys of a kv head and visits all queries of its group that see them: no atomics, and one order of
// sums. Fragments are transposed, keys by queries, so that p and ds are left operands as they are. Source: Dao,
// "FlashAttention-2", 2023, algorithm 2.
#pragma once

#include "cuda/differentiate.cuh"

// SPLIT blocks share the columns of dk and dv, where one's registers can't hold them.
template <class T_, int D_, int M_, int N_, int STAGES_, int SPLIT_, bool OPTIONS_>
struct KeyConfig {
  using T = T_;
  static constexpr int D = D_, M = M_, N = N_, STAGES = STAGES_, SPLIT = SPLIT_, kThreads = N / 16 * 32,
                       kColumns = D / SPLIT;
  static constexpr bool OPTIONS = OPTIONS_;
  static constexpr int kQuery = M * D * kBytes<T>, kKey = N * D * kBytes<T>, kShared = 2 * kKey + 2 * STAGES * kQuery;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture from sm_80 on");
};

template <class C>
KERNEL(C::kThreads)
key_kernel(ARGUMENT AttentionParams p) {
  using T = typename C::T;
  constexpr int D = C::D, M = C::M, N = C::N, kThreads = C::kThreads, kColumns = C::kColumns, STAGES = C::STAGES;
  constexpr bool OPTIONS = C::OPTIONS;
  SHARED(memory);
  char *const k_tile = memory, *const v_tile = memory + C::kKey, *const stages = v_tile + C::kKey;

  const Work work = key_work<N>(p, C::SPLIT);
  const Member& member = work.member;
  const int part = int(block_index() % C::SPLIT), first_row = warp_index() * 16;
  if (work.start >= member.seqlen_k) return;
  const int start_n = int(work.start), keys = int(smaller(N, member.seqlen_k - work.start)),
            group = int(p.heads / p.kv_heads);
  const Visibility sees = visibility(p, member);
  const Interval queries = sees.rows_of_any({work.start, work.start + keys}, member.seqlen_q);
  const int begin = int(queries.lo / M * M);
  const int tiles = queries.empty() ? 0 : int((queries.hi - begin + M - 1) / M), turns = tiles * group;

  // q and dout of a turn, into its stage.
  const auto load_queries = [&](int turn) {
    if (turn < turns) {
      const int64_t head = work.head * group + turn / tiles;
      const int start_m = begin + turn % tiles * M, rows = int(member.seqlen_q) - start_m;
      char* const q_tile = stages + turn % STAGES * 2 * C::kQuery;
      load_tile<T, D, M, kThreads, OPTIONS>(q_tile, p.q, row_of(p.q, member.batch, head, member.first_q + start_m), 0,
                                            rows, int(p.head_dim));
      load_tile<T, D, M, kThreads, OPTIONS>(q_tile + C::kQuery, p.dout,
                                            row_of(p.dout, member.batch, head, member.first_q + start_m), 0, rows,
                                            int(p.head_dim_v));
    }
    commit_copies();
  };
  float dk[1][kColumns / 8][4], dv[1][kColumns / 8][4];
  clear(dk), clear(dv);
  if (turns > 0) {
    const int first = int(sees.start) - start_n, last = int(sees.end) - start_n;
    load_tile<T, D, N, kThreads, OPTIONS>(k_tile, p.k, row_of(p.k, member.batch, work.head, member.first_k + start_n),
                                          first, last, int(p.head_dim));
    load_tile<T, D, N, kThreads, OPTIONS>(v_tile, p.v, row_of(p.v, member.batch, work.head, member.first_k + start_n),
                                          first, last, int(p.head_dim_v));
    load_queries(0);
  }
  const float unit = OPTIONS ? kLog2E : float(p.scale) * kLog2E;
  for (int turn = 0; turn < turns; ++turn) {
    if (STAGES == 2) load_queries(turn + 1);
    wait_copies<STAGES - 1>();
    sync_block();
    const char *const q_tile = stages + turn % STAGES * 2 * C::kQuery, *const dout_tile = q_tile + C::kQuery;
    const int64_t head = work.head * group + turn / tiles;
    const int start_m = begin + turn % tiles * M, rows = int(smaller(M, member.seqlen_q - start_m));
    const Band band(sees, start_m);
    const PairOptions options(p, sees, member.batch, head);
    float x[1][M / 8][4], dp[1][M / 8][4], steep[M / 8][4];
    clear(x), clear(dp);
    add_transposed_product<T, D, M, 1>(x, k_tile, first_row, q_tile);
    add_transposed_product<T, D, M, 1>(dp, v_tile, first_row, dout_tile);
    if (OPTIONS) {
      options.steepness(x[0], steep);
      options.apply<true>(x[0], band, start_m, rows, first_row, start_n);
    } else if (!band.is_full(start_n, N, rows)) {
      hide_transposed(x[0], band, first_row, start_n);
    }

    const int64_t number = row_number(p, member, head) + start_m;
    const OwnColumns columns{static_cast<const float*>(p.lse) + number, static_cast<const float*>(p.delta) + number,
                             rows};
    differentiate<true, OPTIONS>(x[0], dp[0], columns, unit, Dropout(p, member.batch, head), start_m,
                                 start_n + first_row);
    if (OPTIONS) unbend(dp[0], steep);
    add_product<T, D, M, 1, kColumns>(dv, x, dout_tile, part * kColumns);
    add_product<T, D, M, 1, kColumns>(dk, dp, q_tile, part * kColumns);
    sync_block();  // nobody reads this stage any more
    if (STAGES == 1) load_queries(turn + 1);
  }

  const float scale[2] = {float(p.scale), float(p.scale)}, one[2] = {1.0f, 1.0f};
  const int column = part * kColumns;
  char* const dk_rows = row_of(p.dk, member.batch, work.head, member.first_k + start_n) + column * p.dk.dim;
  char* const dv_rows = row_of(p.dv, member.batch, work.head, member.first_k + start_n) + column * p.dv.dim;
  store_rows<T, D, OPTIONS, kColumns>(p.dk, dk_rows, k_tile, first_row, keys, int(p.head_dim) - column, dk[0], scale);
  store_rows<T, D, OPTIONS, kColumns>(p.dv, dv_rows, v_tile, first_row, keys, int(p.head_dim_v) - column, dv[0], one);
}
