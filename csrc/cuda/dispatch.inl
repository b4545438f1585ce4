// Chooses the kernel of a call, for one type of q, k and v.
#pragma once

#include "cuda/backward_bias.cuh"
#include "cuda/backward_keys.cuh"
#include "cuda/backward_queries.cuh"
#include "cuda/decode.cuh"
#include "cuda/forward.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace {

// Whether the kernels without options serve: whole chunks, and scores that are products times a number above 0.
template <class T>
bool is_plain(const AttentionParams& p) {
  const bool whole = p.head_dim % kPerChunk<T> == 0 && p.head_dim_v % kPerChunk<T> == 0 && is_aligned<T>(p.q) &&
                     is_aligned<T>(p.k) && is_aligned<T>(p.v) && is_aligned<T>(p.out);
  const float unit = float(p.scale) * kLog2E;
  return whole && unit > 0.0f && unit < 1e30f && p.softcap == 0.0 && !p.mask.data && !p.bias.data && !p.slopes &&
         !p.sinks && !p.dropout_seed;
}

template <class T, int D, bool OPTIONS>
int run_forward(const AttentionParams& p, Stream stream) {
  constexpr Tiles kTiles = forward_tiles(kBytes<T>, D, OPTIONS);
  using Forward = ForwardConfig<T, D, kTiles.m, kTiles.n, 4, OPTIONS>;
  return launch<Forward, &forward_kernel<Forward>>(slots(p, p.cu_seqlens_q, p.seqlen_q, Forward::M) * p.heads, p,
                                                   stream);
}

template <class T, int D>
int run_bias(const AttentionParams& p, Stream stream) {
  constexpr Tiles kTiles = bias_tiles(kBytes<T>, D);
  using Bias = BiasConfig<T, D, kTiles.m, kTiles.n>;
  const int64_t tiles = owners(p.dbias.seq, (p.seqlen_q + Bias::M - 1) / Bias::M) *
                        owners(p.dbias.dim, (p.seqlen_k + Bias::N - 1) / Bias::N);
  const int64_t blocks = tiles * owners(p.dbias.head, p.heads) * owners(p.dbias.batch, p.batch);
  return launch<Bias, &bias_kernel<Bias>>(blocks, p, stream);
}

template <class T, int D, bool OPTIONS>
int run_backward(const AttentionParams& p, Stream stream) {
  constexpr Tiles kKeys = key_tiles(kBytes<T>, D, OPTIONS), kQueries = query_tiles(kBytes<T>, D, OPTIONS);
  using Keys = KeyConfig<T, D, kKeys.m, kKeys.n, kKeys.stages, kKeys.split, OPTIONS>;
  using Queries = QueryConfig<T, D, kQueries.m, kQueries.n, kQueries.stages, OPTIONS>;
  const int64_t rows = (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q, warps = kDeltaThreads / 32;
  int error = launch<DeltaConfig, &delta_kernel<T>>((rows + warps - 1) / warps, p, stream);
  if (!error && p.dk.data) {
    const int64_t blocks = slots(p, p.cu_seqlens_k, p.seqlen_k, Keys::N) * p.kv_heads * Keys::SPLIT;
    error = launch<Keys, &key_kernel<Keys>>(blocks, p, stream);
  }
  if (!error && p.dq.data)
    error =
        launch<Queries, &query_kernel<Queries>>(slots(p, p.cu_seqlens_q, p.seqlen_q, Queries::M) * p.heads, p, stream);
  if constexpr (OPTIONS) {
    if (!error && p.dslopes) error = launch<SlopeConfig, &slope_kernel<SlopeConfig>>(p.batch * p.heads, p, stream);
    if (!error && p.dbias.data) error = run_bias<T, D>(p, stream);
  }
  return error;
}

// By the wider of head_dim and head_dim_v.
template <class T, bool OPTIONS>
int forward_by_width(const AttentionParams& p, Stream stream) {
  const int64_t widest = larger(p.head_dim, p.head_dim_v);
  if (widest <= 64) return run_forward<T, 64, OPTIONS>(p, stream);
  if (widest <= 128) return run_forward<T, 128, OPTIONS>(p, stream);
  return run_forward<T, 256, OPTIONS>(p, stream);
}

template <class T, bool OPTIONS>
int backward_by_width(const AttentionParams& p, Stream stream) {
  const int64_t widest = larger(p.head_dim, p.head_dim_v);
  if (widest <= 64) return run_backward<T, 64, OPTIONS>(p, stream);
  if (widest <= 128) return run_backward<T, 128, OPTIONS>(p, stream);
  return run_backward<T, 256, OPTIONS>(p, stream);
}

template <class T, int D>
int run_split(const AttentionParams& p, Stream stream) {
  using Split = SplitConfig<T, D, split_warps(kBytes<T>, D)>;
  const int64_t splits = (p.seqlen_k + p.split_keys - 1) / p.split_keys, rows = p.batch * p.heads * p.seqlen_q;
  const int64_t tiles = p.kv_heads ? (p.heads / p.kv_heads * p.seqlen_q + 15) / 16 : 0, warps = kCombineThreads / 32;
  const int error = launch<Split, &split_kernel<Split>>(splits * tiles * p.kv_heads * p.batch, p, stream);
  return error ? error : launch<CombineConfig, &combine_kernel<T>>((rows + warps - 1) / warps, p, stream);
}

template <class T>
int split_of(const AttentionParams& p, Stream stream) {
  const int64_t widest = larger(p.head_dim, p.head_dim_v);
  if (widest <= 64) return run_split<T, 64>(p, stream);
  if (widest <= 128) return run_split<T, 128>(p, stream);
  return run_split<T, 256>(p, stream);
}

// Products of float32 take so long that options cost nothing beside them.
template <class T>
int forward_of(const AttentionParams& p, Stream stream) {
  if constexpr (kBytes<T> == 2)
    if (is_plain<T>(p)) return forward_by_width<T, false>(p, stream);
  return forward_by_width<T, true>(p, stream);
}

template <class T>
int backward_of(const AttentionParams& p, Stream stream) {
  if constexpr (kBytes<T> == 2) {
    const auto absent_or_aligned = [](const View& x) { return !x.data || is_aligned<T>(x); };
    if (is_plain<T>(p) && is_aligned<T>(p.dout) && absent_or_aligned(p.dq) && absent_or_aligned(p.dk) &&
        absent_or_aligned(p.dv))
      return backward_by_width<T, false>(p, stream);
  }
  return backward_by_width<T, true>(p, stream);
}

}  // namespace
