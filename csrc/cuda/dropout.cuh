// Which pairs dropout keeps: Philox 4x32-10 of the indices alone, so that every pass and backend agrees.
//
//   word j mod 4 of philox(counter = (j div 4, i, batch * heads + head, offset), key = seed) keeps (i, j) where it
//   reaches p 2^32
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "cuda/tile.cuh"

struct Dropout {
  uint32_t key[2], stream, offset, threshold;

  DEVICE Dropout(const AttentionParams& p, int64_t batch, int64_t head) {
    const uint64_t seed = load_global<uint64_t>(p.dropout_seed);
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    stream = uint32_t(batch * p.heads + head), offset = load_global<uint32_t>(p.dropout_seed + 1);
    threshold = uint32_t(p.dropout_threshold);
  }

  // The words of keys quad * 4 and on.
  DEVICE void words(uint32_t (&c)[4], uint32_t quad, uint32_t query) const {
    c[0] = quad, c[1] = query, c[2] = stream, c[3] = offset;
    uint32_t key0 = key[0], key1 = key[1];
#pragma unroll 1  // or each fragment has ten rounds for every pair of keys, in code
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = multiply_high(0xd2511f53u, c[0]), low0 = 0xd2511f53u * c[0];
      const uint32_t high2 = multiply_high(0xcd9e8d57u, c[2]), low2 = 0xcd9e8d57u * c[2];
      c[0] = high2 ^ c[1] ^ key0, c[1] = low2;
      c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
      key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
  }

  // Whether a pair is kept.
  DEVICE bool keeps(int64_t query, int64_t key) const {
    uint32_t c[4];
    words(c, uint32_t(key / 4), uint32_t(query));
    const uint32_t low = key & 1 ? c[1] : c[0], high = key & 1 ? c[3] : c[2];
    return (key & 2 ? high : low) >= threshold;
  }

  // Zeros for the pairs that are dropped; keys count from start_n, which 4 divides, queries from start_m.
  template <int N>
  DEVICE void drop(float (&x)[N][4], int64_t start_m, int64_t start_n) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t c[4];
        words(c, uint32_t((start_n + i * 8) / 4) + lane_index() % 4 / 2, uint32_t(start_m + fragment_row(r)));
        const bool upper = lane_index() % 2;
        if ((upper ? c[2] : c[0]) < threshold) x[i][2 * r] = 0.0f;
        if ((upper ? c[3] : c[1]) < threshold) x[i][2 * r + 1] = 0.0f;
      }
  }
};
