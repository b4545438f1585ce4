// Which tile of rows a block computes: one dimension of blocks, over tiles, heads and batch members.
#pragma once

#include "cuda/tile.cuh"

struct Work {
  Member member;
  int64_t head, start;  // its first row, which may lie past the member's last
};

// Of packed rows an upper bound, so that nobody has to ask the device: member b owns the slots from
// cu_seqlens[b] / size + b on, one for each `size` of its rows and one for what is left.
inline int64_t slots(const AttentionParams& p, const int64_t* cu_seqlens, int64_t seqlen, int size) {
  return cu_seqlens ? (p.batch ? seqlen / size + p.batch : 0) : (seqlen + size - 1) / size * p.batch;
}

// The last member whose slots begin at `slot` or before.
DEVICE int64_t member_at(const AttentionParams& p, const int64_t* cu_seqlens, int64_t seqlen, int64_t slot, int size,
                         int64_t& start) {
  int64_t low = 0, high = p.batch - 1;
  const auto first_slot = [&](int64_t b) { return clamp(load_global<int64_t>(cu_seqlens + b), 0, seqlen) / size + b; };
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_slot(middle) <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  start = larger(slot - first_slot(low), 0) * size;
  return low;
}

// Tiles of N keys of a kv head; `parts` successive blocks share one.
template <int N>
DEVICE Work key_work(const AttentionParams& p, int parts) {
  const int64_t block = block_index() / parts;
  if (p.cu_seqlens_k) {
    const int64_t all = p.seqlen_k / N + p.batch;
    int64_t start;
    const int64_t batch = member_at(p, p.cu_seqlens_k, p.seqlen_k, block % all, N, start);
    return {member_of(p, batch), block / all, start};
  }
  const int64_t tiles = (p.seqlen_k + N - 1) / N;
  return {member_of(p, block / tiles / p.kv_heads), block / tiles % p.kv_heads, block % tiles * N};
}

template <int M>
DEVICE Work query_work(const AttentionParams& p) {
  const int64_t block = block_index();
  if (p.cu_seqlens_q) {
    const int64_t all = p.seqlen_q / M + p.batch;
    int64_t start;
    const int64_t batch = member_at(p, p.cu_seqlens_q, p.seqlen_q, block % all, M, start);
    return {member_of(p, batch), block / all, start};
  }
  const int64_t tiles = (p.seqlen_q + M - 1) / M, tile = block % tiles;
  // The longest rows of a causal head start first.
  const int64_t start = (p.window_right == kUnbounded ? tile : tiles - 1 - tile) * M;
  return {member_of(p, block / tiles / p.heads), block / tiles % p.heads, start};
}
