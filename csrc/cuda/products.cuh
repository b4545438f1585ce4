// Products of tiles, on the tensor cores: mma.m16n8k16 of 16-bit numbers, three of m16n8k8 for float32.
#pragma once

#include "cuda/tile.cuh"

// x (16 TILES x N) += a b^T, where the rows of a begin at `row`.
template <class T, int D, int N, int TILES>
DEVICE void add_transposed_product(float (&x)[TILES][N / 8][4], const char* a, int row, const char* b) {
  const unsigned lane = lane_index();
#pragma unroll
  for (int k = 0; k < D / kPerChunk<T> / 2; ++k) {
    uint32_t left[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      load_matrices(left[t], a + place<T, D>(row + t * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      load_matrices(right, b + place<T, D>(n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply_add(T(), x[t][2 * n], left[t], right[0], right[1]);
        multiply_add(T(), x[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// What follows for 16 bits: w is rounded to them.
template <class T, int D, int N, int TILES, int COLUMNS>
DEVICE void add_short_product(float (&x)[TILES][COLUMNS / 8][4], const float (&w)[TILES][N / 8][4], const char* b,
                              int first_column) {
  const unsigned lane = lane_index();
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    uint32_t left[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        left[t][j] = pack(T(), w[t][2 * k + j / 2][j % 2 * 2], w[t][2 * k + j / 2][j % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, b + place<T, D>(k * 16 + lane % 16, first_column / 8 + n * 2 + lane / 16));
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply_add(T(), x[t][2 * n], left[t], right[0], right[1]);
        multiply_add(T(), x[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// x (16 TILES x COLUMNS) += w b, of the columns of b from first_column on.
template <class T, int D, int N, int TILES, int COLUMNS = D>
DEVICE void add_product(float (&x)[TILES][COLUMNS / 8][4], const float (&w)[TILES][N / 8][4], const char* b,
                        int first_column = 0) {
  if constexpr (kBytes<T> == 2) {
    add_short_product<T, D, N, TILES, COLUMNS>(x, w, b, first_column);
  } else {
    const int row = int(lane_index() % 4) * 2, column = first_column + int(lane_index() / 4);
#pragma unroll
    for (int k = 0; k < N / 8; ++k) {
      // The terms of a sum may come in any order: number c of a product's eight is key 2 c, from four on 2 c - 7, so
      // that the lane that has a weight needs it.
      uint32_t left[TILES][4];
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) left[t][j] = as_bits(w[t][k][j % 2 * 2 + j / 2]);
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n) {
        uint32_t right[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int chunk = (column + n * 8) / 4;
          right[j] = load_shared<uint32_t>(b + place<T, D>(k * 8 + row + j, chunk) + column % 4 * 4);
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t) multiply_add(T(), x[t][n], left[t], right[0], right[1]);
      }
    }
  }
}
