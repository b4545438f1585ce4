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
  float scale;  // of what is kept
  bool drops;   // or every pair is kept

  DEVICE Dropout(const AttentionParams& p, int64_t batch, int64_t head)
      : scale(p.dropout_seed ? float(p.dropout_scale) : 1.0f), drops(p.dropout_seed) {
    if (!drops) return;
    const uint64_t seed = load_global<uint64_t>(p.dropout_seed);
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    stream = uint32_t(batch * p.heads + head), offset = load_global<uint32_t>(p.dropout_seed + 1);
    threshold = uint32_t(p.dropout_threshold);
  }

  // Which of a fragment's four pairs are kept, its rows queries or, transposed, keys; 4 divides the first key. For all
  // lanes alike: those that hold keys of the same four draw their words together.
  template <bool TRANSPOSED>
  DEVICE void draw(bool (&kept)[4], int64_t first_query, int64_t first_key) const {
    uint32_t c[4];
    if (TRANSPOSED)
      words_of_four_lanes(c, uint32_t(first_query), uint32_t(first_key / 4));
    else
      words_of_two_lanes(c, uint32_t(first_query), uint32_t(first_key / 4));
#pragma unroll
    for (int e = 0; e < 4; ++e) kept[e] = c[e] >= threshold;
  }

  // Zeros for the pairs of 16 queries that are dropped.
  template <int N>
  DEVICE void drop(float (&x)[N][4], int64_t first_query, int64_t start_n) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bool kept[4];
      draw<false>(kept, first_query, start_n + i * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][e] = kept[e] ? x[i][e] : 0.0f;
    }
  }

 private:
  // The words of keys 4 quad and on.
  DEVICE void words(uint32_t (&c)[4], uint32_t quad, uint32_t query) const {
    c[0] = quad, c[1] = query, c[2] = stream, c[3] = offset;
    uint32_t key0 = key[0], key1 = key[1];
#pragma unroll 1  // or each fragment has ten rounds, in code
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = multiply_high(0xd2511f53u, c[0]), low0 = 0xd2511f53u * c[0];
      const uint32_t high2 = multiply_high(0xcd9e8d57u, c[2]), low2 = 0xcd9e8d57u * c[2];
      c[0] = high2 ^ c[1] ^ key0, c[1] = low2;
      c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
      key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
  }

  // Two neighbours hold two rows of the same four keys: each draws a row, and hands over what is the other's half.
  DEVICE void words_of_two_lanes(uint32_t (&c)[4], uint32_t query, uint32_t quad) const {
    const bool upper = lane_index() % 2;
    words(c, quad + lane_index() % 4 / 2, query + fragment_row(upper));
    const uint32_t first = shuffle_xor(upper ? c[0] : c[2], 1), second = shuffle_xor(upper ? c[1] : c[3], 1);
    if (upper)
      c[0] = first, c[1] = second;
    else
      c[2] = first, c[3] = second;
  }

  // Four lanes hold one key each of the same fours: lane n draws those of its element n, and the 4 x 4 words change
  // places.
  DEVICE void words_of_four_lanes(uint32_t (&c)[4], uint32_t query, uint32_t quad) const {
    const unsigned n = lane_index() / 4 % 4;
    words(c, quad + lane_index() / 16 + n / 2 * 2, query + fragment_column(0, n));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const bool upper = n & step;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int low = step == 1 ? pair * 2 : pair, high = low + step;
        const uint32_t given = shuffle_xor(upper ? c[low] : c[high], step * 4);
        if (upper)
          c[low] = given;
        else
          c[high] = given;
      }
    }
  }
};
