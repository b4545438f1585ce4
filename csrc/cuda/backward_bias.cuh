// Fused attention, backward, the gradient of a bias: ds, summed over the dimensions in which the bias has one place for
// all.
//
// A block owns a tile of the gradient and visits all pairs that share it: no atomics, and one order of sums.
#pragma once

#include "cuda/differentiate.cuh"

template <class T_, int D_, int M_, int N_>
struct BiasConfig {
  using T = T_;
  static constexpr int D = D_, M = M_, N = N_, kThreads = M / 16 * 32;
  static constexpr int kQuery = M * D * kBytes<T>, kKey = N * D * kBytes<T>, kShared = 2 * kQuery + 2 * kKey;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture from sm_80 on");
  static_assert(M * N * 4 <= kShared, "the sums take the place of the tiles");
};

// How many blocks share a dimension of the gradient, of which a stride of 0 says that it has one place for all.
inline int64_t owners(int64_t stride, int64_t count) { return stride ? count : 1; }

// What the block owns of it, and the number that says so taken from `block`.
DEVICE Interval owned(int64_t stride, int64_t count, int64_t& block) {
  if (!stride) return {0, count};
  const int64_t own = block % count;
  block /= count;
  return {own, own + 1};
}

// Sums of M x N pairs to the places [0, rows) x [0, columns), over the whole of a dimension with one place.
template <class C, class U>
DEVICE void store_sums(const char* sums, const View& to, char* at, int rows, int columns) {
  const int tall = to.seq ? 1 : C::M, wide = to.dim ? 1 : C::N;
  for (int i = int(thread_index()); i < rows * columns; i += C::kThreads) {
    const int row = i / columns, column = i % columns;
    float sum = 0.0f;
    for (int m = 0; m < tall; ++m)
      for (int n = 0; n < wide; ++n) sum += load_shared<float>(sums + ((row + m) * C::N + column + n) * 4);
    store_real(U(), at + row * to.seq + column * to.dim, sum);
  }
}

template <class C>
KERNEL(C::kThreads)
bias_kernel(ARGUMENT AttentionParams p) {
  using T = typename C::T;
  constexpr int D = C::D, M = C::M, N = C::N, kThreads = C::kThreads;
  SHARED(memory);
  char *const q_tile = memory, *const dout_tile = memory + C::kQuery, *const k_tile = dout_tile + C::kQuery,
              *const v_tile = k_tile + C::kKey;
  const int first_row = warp_index() * 16;
  int64_t block = block_index();
  const Interval k_tiles = owned(p.dbias.dim, (p.seqlen_k + N - 1) / N, block);
  const Interval q_tiles = owned(p.dbias.seq, (p.seqlen_q + M - 1) / M, block);
  const Interval heads = owned(p.dbias.head, p.heads, block), members = owned(p.dbias.batch, p.batch, block);

  float sum[1][N / 8][4];
  clear(sum);
  const auto add_tile = [&](const Member& member, const Visibility& sees, int64_t head, int64_t start_m, int start_n) {
    const int rows = int(smaller(M, p.seqlen_q - start_m));
    const Interval seen = sees.keys_of_any({start_m, start_m + rows}).intersect({start_n, start_n + N});
    if (seen.empty()) return;
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    const int first = int(seen.lo) - start_n, last = int(seen.hi) - start_n;
    sync_block();  // nobody reads the last tiles any more
    load_tile<T, D, M, kThreads, true>(q_tile, p.q, row_of(p.q, member.batch, head, start_m), 0, rows, int(p.head_dim));
    load_tile<T, D, M, kThreads, true>(dout_tile, p.dout, row_of(p.dout, member.batch, head, start_m), 0, rows,
                                       int(p.head_dim_v));
    load_tile<T, D, N, kThreads, true>(k_tile, p.k, row_of(p.k, member.batch, kv_head, start_n), first, last,
                                       int(p.head_dim));
    load_tile<T, D, N, kThreads, true>(v_tile, p.v, row_of(p.v, member.batch, kv_head, start_n), first, last,
                                       int(p.head_dim_v));
    commit_copies();
    wait_copies<0>();
    sync_block();
    float x[1][N / 8][4], dp[1][N / 8][4];
    clear(x), clear(dp);
    add_transposed_product<T, D, N, 1>(x, q_tile, first_row, k_tile);
    add_transposed_product<T, D, N, 1>(dp, dout_tile, first_row, v_tile);
    PairOptions(p, sees, member.batch, head).apply(x[0], Band(sees, start_m), start_m, rows, first_row, start_n);
    const int64_t number = row_number(p, member, head) + start_m;
    const OwnRows own(static_cast<const float*>(p.lse) + number, static_cast<const float*>(p.delta) + number, first_row,
                      rows);
    differentiate<false, true>(x[0], dp[0], own, kLog2E, Dropout(p, member.batch, head), start_m + first_row, start_n);
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[0][i][e] += dp[0][i][e];
  };
  for (int64_t b = members.lo; b < members.hi; ++b) {
    const Member member = member_of(p, b);
    const Visibility sees = visibility(p, member);
    for (int64_t head = heads.lo; head < heads.hi; ++head)
      for (int64_t m = q_tiles.lo; m < q_tiles.hi; ++m)
        for (int64_t n = k_tiles.lo; n < k_tiles.hi; ++n) add_tile(member, sees, head, m * M, int(n * N));
  }

  sync_block();
  Pairs<false>::each(sum[0], first_row,
                     [&](float& s, int row, int column) { store_shared(memory + (row * N + column) * 4, s); });
  sync_block();
  const View& to = p.dbias;
  const int64_t start_m = to.seq ? q_tiles.lo * M : 0, start_n = to.dim ? k_tiles.lo * N : 0;
  const int rows = to.seq ? int(smaller(M, p.seqlen_q - start_m)) : 1;
  const int columns = to.dim ? int(smaller(N, p.seqlen_k - start_n)) : 1;
  char* const at = row_of(to, members.lo, heads.lo, start_m) + start_n * to.dim;
  if (to.element == Element::kFloat32)
    store_sums<C, Float32>(memory, to, at, rows, columns);
  else if (to.element == Element::kFloat64)
    store_sums<C, double>(memory, to, at, rows, columns);
  else if (to.element == Element::kBFloat16)
    store_sums<C, BFloat16>(memory, to, at, rows, columns);
  else
    store_sums<C, Float16>(memory, to, at, rows, columns);
}
