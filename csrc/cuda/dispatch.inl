// Chooses the kernel of a call, for one type of q, k and v.
//
// All tiles fit into the 99 KB of shared memory that a block may have on every architecture from sm_80 on.
#pragma once

#include "cuda/backward_keys.cuh"
#include "cuda/backward_queries.cuh"
#include "cuda/forward.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace {

// By the wider of head_dim and head_dim_v.
template <class T, int D, bool OPTIONS>
struct ForwardOf;
template <class T>
struct ForwardOf<T, 64, false> : ForwardConfig<T, 64, 128, 64, 4, false> {};
template <class T>
struct ForwardOf<T, 128, false> : ForwardConfig<T, 128, 128, 32, 4, false> {};
template <class T>
struct ForwardOf<T, 256, false> : ForwardConfig<T, 256, 64, 32, 4, false> {};
template <class T>
struct ForwardOf<T, 64, true> : ForwardConfig<T, 64, 64, 64, 4, true> {};
template <class T>
struct ForwardOf<T, 128, true> : ForwardConfig<T, 128, 64, 64, 4, true> {};
template <class T>
struct ForwardOf<T, 256, true> : ForwardConfig<T, 256, 64, 32, 4, true> {};

// Whether the kernels without options serve: whole chunks, and scores that are products times a number above 0.
bool is_plain(const AttentionParams& p) {
  const bool whole = p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && is_aligned(p.q) && is_aligned(p.k) &&
                     is_aligned(p.v) && is_aligned(p.out);
  const float unit = float(p.scale) * kLog2E;
  return whole && unit > 0.0f && unit < 1e30f && p.softcap == 0.0 && !p.mask.data && !p.bias.data && !p.slopes &&
         !p.sinks && !p.dropout_seed;
}

template <class C>
int run_forward(const AttentionParams& p, Stream stream) {
  return launch<C>(&forward_kernel<C>, slots(p, p.cu_seqlens_q, p.seqlen_q, C::M) * p.heads, p, stream);
}

template <class T, bool OPTIONS>
int forward_by_width(const AttentionParams& p, Stream stream) {
  const int64_t widest = larger(p.head_dim, p.head_dim_v);
  if (widest <= 64) return run_forward<ForwardOf<T, 64, OPTIONS>>(p, stream);
  if (widest <= 128) return run_forward<ForwardOf<T, 128, OPTIONS>>(p, stream);
  return run_forward<ForwardOf<T, 256, OPTIONS>>(p, stream);
}

template <class T>
int forward_of(const AttentionParams& p, Stream stream) {
  return is_plain(p) ? forward_by_width<T, false>(p, stream) : forward_by_width<T, true>(p, stream);
}

// Of the backward's passes.
template <class T, int D, bool OPTIONS>
struct KeysOf;
template <class T, bool OPTIONS>
struct KeysOf<T, 64, OPTIONS> : KeyConfig<T, 64, 64, 64, 1, OPTIONS> {};
template <class T, bool OPTIONS>
struct KeysOf<T, 128, OPTIONS> : KeyConfig<T, 128, 32, 64, 1, OPTIONS> {};
template <class T, bool OPTIONS>
struct KeysOf<T, 256, OPTIONS> : KeyConfig<T, 256, 16, 64, 2, OPTIONS> {};
template <class T, int D, bool OPTIONS>
struct QueriesOf;
template <class T, bool OPTIONS>
struct QueriesOf<T, 64, OPTIONS> : QueryConfig<T, 64, 64, 64, OPTIONS> {};
template <class T, bool OPTIONS>
struct QueriesOf<T, 128, OPTIONS> : QueryConfig<T, 128, 64, 32, OPTIONS> {};
template <class T, bool OPTIONS>
struct QueriesOf<T, 256, OPTIONS> : QueryConfig<T, 256, 64, 16, OPTIONS> {};

template <class T, int D, bool OPTIONS>
int run_backward(const AttentionParams& p, Stream stream) {
  using Keys = KeysOf<T, D, OPTIONS>;
  using Queries = QueriesOf<T, D, OPTIONS>;
  const int64_t rows = (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q, warps = kDeltaThreads / 32;
  int error = launch<DeltaConfig>(&delta_kernel<T>, (rows + warps - 1) / warps, p, stream);
  if (!error && p.dk.data) {
    const int64_t blocks = slots(p, p.cu_seqlens_k, p.seqlen_k, Keys::N) * p.kv_heads * Keys::SPLIT;
    error = launch<Keys>(&key_kernel<Keys>, blocks, p, stream);
  }
  if (!error && p.dq.data)
    error =
        launch<Queries>(&query_kernel<Queries>, slots(p, p.cu_seqlens_q, p.seqlen_q, Queries::M) * p.heads, p, stream);
  return error;
}

template <class T, bool OPTIONS>
int backward_by_width(const AttentionParams& p, Stream stream) {
  const int64_t widest = larger(p.head_dim, p.head_dim_v);
  if (widest <= 64) return run_backward<T, 64, OPTIONS>(p, stream);
  if (widest <= 128) return run_backward<T, 128, OPTIONS>(p, stream);
  return run_backward<T, 256, OPTIONS>(p, stream);
}

template <class T>
int backward_of(const AttentionParams& p, Stream stream) {
  const auto absent_or_aligned = [](const View& x) { return !x.data || is_aligned(x); };
  const bool plain = is_plain(p) && is_aligned(p.dout) && absent_or_aligned(p.dq) && absent_or_aligned(p.dk) &&
                     absent_or_aligned(p.dv);
  return plain ? backward_by_width<T, false>(p, stream) : backward_by_width<T, true>(p, stream);
}

template <class... C>
int load_all() {
  int error = 0;
  ((error = error ? error : load<C>(&forward_kernel<C>)), ...);
  return error;
}

template <class T>
int load_of() {
  return load_all<ForwardOf<T, 64, false>, ForwardOf<T, 128, false>, ForwardOf<T, 256, false>, ForwardOf<T, 64, true>,
                  ForwardOf<T, 128, true>, ForwardOf<T, 256, true>>();
}

}  // namespace
