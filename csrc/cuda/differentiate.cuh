// What both passes of the backward make of a tile of scores, and delta, which both read.
//
//   p = exp(scores - lse),   ds = p (dropout (dout v^T) - delta),   delta = rowsum(dout out) - dlse
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/finite.cuh"
#include "cuda/schedule.cuh"
#include "cuda/scores.cuh"
#include "cuda/softmax.cuh"

// A row's lse and delta.
struct RowGradient {
  float lse, delta;
  bool here;  // or nothing depends on it

  DEVICE RowGradient() : lse(0.0f), delta(0.0f), here(false) {}
  DEVICE RowGradient(const float* lses, const float* deltas, int64_t row)
      : lse(load_global<float>(lses + row)), delta(load_global<float>(deltas + row)), here(true) {}

  // x: scores, or of the plain kernels products that `unit` makes scores in base 2.
  template <bool OPTIONS>
  DEVICE float probability(float x, float unit) const {
    // Hidden, from a row whose lse may be nan; or of a query that is not there, which nobody hid from a key of nan.
    if (x == -infinity() || !here) return 0.0f;
    const float pivot = lse == -infinity() ? 0.0f : lse;
    const float p = power_of_2(OPTIONS ? (x - pivot) * unit : fmaf(x, unit, -pivot * kLog2E));
    return p > 1.0f ? 1.0f : p;  // however a large lse was rounded
  }

  // 0 where the pair is hidden, whatever its dp.
  DEVICE float score_gradient(float p, float dp) const { return p == 0.0f ? 0.0f : p * (dp - delta); }
};

// The two rows of queries that a lane holds.
struct OwnRows {
  RowGradient row[2];

  DEVICE OwnRows(const float* lses, const float* deltas, int first_row, int rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (first_row + fragment_row(r) < rows) row[r] = RowGradient(lses, deltas, first_row + fragment_row(r));
  }

  DEVICE RowGradient of_pair(int, int e) const { return row[e / 2]; }
};

// The queries of a transposed fragment: `rows` there are.
struct OwnColumns {
  const float *lses, *deltas;
  int rows;

  DEVICE RowGradient of_pair(int i, int e) const {
    const int column = fragment_column(i, e);
    return column < rows ? RowGradient(lses, deltas, column) : RowGradient();
  }
};

// Of a fragment whose rows are queries or, transposed, keys: scores become weights that dropout has been at, and the
// products dout v^T become the gradients of scores.
template <bool TRANSPOSED, bool OPTIONS, int N, class Rows>
DEVICE void differentiate(float (&x)[N][4], float (&dp)[N][4], const Rows& rows, float unit, const Dropout& dropout,
                          int64_t first_query, int64_t first_key) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    bool kept[4];
    if (OPTIONS && dropout.drops)
      dropout.draw<TRANSPOSED>(kept, first_query + (TRANSPOSED ? i * 8 : 0), first_key + (TRANSPOSED ? 0 : i * 8));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int e = TRANSPOSED ? n / 2 + n % 2 * 2 : n;  // those of one query one after the other
      const RowGradient row = rows.of_pair(i, e);
      const float weight = row.template probability<OPTIONS>(x[i][e], unit);
      const float factor = OPTIONS && dropout.drops ? (kept[e] ? dropout.scale : 0.0f) : 1.0f;
      x[i][e] = weight * factor;
      dp[i][e] = row.score_gradient(weight, dp[i][e] * factor);
    }
  }
}

// The gradients of scores become those of products before a softcap.
template <int N>
DEVICE void unbend(float (&ds)[N][4], const float (&steep)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (ds[i][e] != 0.0f) ds[i][e] *= steep[i][e];
}

// Where the numbers of a head's rows begin, of lse and what is laid out like it.
DEVICE int64_t row_number(const AttentionParams& p, const Member& member, int64_t head) {
  return member.batch * (p.cu_seqlens_q ? 0 : p.lse_batch) + head * p.lse_head + member.first_q;
}

constexpr int kDeltaThreads = 128;

struct DeltaConfig {
  static constexpr int kThreads = kDeltaThreads, kShared = 0;
};

// A warp adds up one row.
template <class T>
KERNEL(kDeltaThreads)
delta_kernel(ARGUMENT AttentionParams p) {
  const int64_t row = block_index() * (kDeltaThreads / 32) + warp_index();
  const int64_t members = p.cu_seqlens_q ? 1 : p.batch;
  if (row >= members * p.heads * p.seqlen_q) return;
  const int64_t batch = row / p.seqlen_q / p.heads, head = row / p.seqlen_q % p.heads, query = row % p.seqlen_q;
  const char *const out = row_of(p.out, batch, head, query), *const dout = row_of(p.dout, batch, head, query);
  float sum = 0.0f;
  for (int64_t i = lane_index(); i < p.head_dim_v; i += 32)
    sum += load_real(T(), out + i * p.out.dim) * load_real(T(), dout + i * p.dout.dim);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() != 0) return;
  const int64_t at = batch * p.lse_batch + head * p.lse_head + query;
  if (p.dlse) sum -= load_global<float>(static_cast<const float*>(p.dlse) + at);
  store_global(static_cast<float*>(p.delta) + at, sum);
}
