// What both passes of the backward make of a tile of scores, and delta, which both read.
//
//   p = exp(scores - lse),   ds = p (dropout (dout v^T) - delta),   delta = rowsum(dout out) - dlse
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/finite.cuh"
#include "cuda/schedule.cuh"
#include "cuda/scores.cuh"
#include "cuda/softmax.cuh"

// A row's lse and delta; of a row that is not there everything is 0.
struct RowGradient {
  float lse, delta;

  DEVICE RowGradient() : lse(infinity()), delta(0.0f) {}
  DEVICE RowGradient(const float* lses, const float* deltas, int64_t row)
      : lse(load_global<float>(lses + row)), delta(load_global<float>(deltas + row)) {}

  // x: scores, or of the plain kernels products that `unit` makes scores in base 2.
  template <bool OPTIONS>
  DEVICE float probability(float x, float unit) const {
    if (x == -infinity()) return 0.0f;  // hidden, from a row whose lse may be nan
    const float pivot = lse == -infinity() ? 0.0f : lse;
    const float p = power_of_2(OPTIONS ? (x - pivot) * unit : fmaf(x, unit, -pivot * kLog2E));
    return p > 1.0f ? 1.0f : p;  // however a large lse was rounded
  }

  // 0 where the pair is hidden, whatever its dp.
  DEVICE float score_gradient(float p, float dp) const { return p == 0.0f ? 0.0f : p * (dp - delta); }
};

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
    sum += widen(T(), load_global<uint16_t>(out + i * p.out.dim)) *
           widen(T(), load_global<uint16_t>(dout + i * p.dout.dim));
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() != 0) return;
  const int64_t at = batch * p.lse_batch + head * p.lse_head + query;
  if (p.dlse) sum -= load_global<float>(static_cast<const float*>(p.dlse) + at);
  store_global(static_cast<float*>(p.delta) + at, sum);
}
