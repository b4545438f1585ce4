// Tiles of 16-bit rows, in shared memory and as the fragments of mma.m16n8k16.
//
//   in shared memory chunk c (16 bytes) of row r lies at place c ^ (r mod 8), so that the same chunk of eight rows is
//   in eight different groups of banks
//
//   in registers x[i] of 16 rows holds columns 8 i + 2 (lane mod 4) + {0, 1}: x[i][0], x[i][1] of row lane div 4,
//   x[i][2], x[i][3] of the row eight further on
#pragma once

#include "attention.h"
#include "cuda/prims.cuh"
#include "mask.h"

constexpr int kChunk = 16;  // bytes, of eight elements

DEVICE unsigned lane_index() { return thread_index() % 32; }
DEVICE int warp_index() { return int(thread_index() / 32); }
DEVICE int fragment_row(int r) { return int(lane_index() / 4) + r * 8; }
DEVICE int fragment_column(int i, int e) { return i * 8 + int(lane_index() % 4) * 2 + (e & 1); }

DEVICE char* row_of(const View& x, int64_t batch, int64_t head, int64_t row) {
  return x.data + batch * x.batch + head * x.head + row * x.seq;
}

// Whether the chunks of every row can be read and written as a whole.
HOST_DEVICE inline bool is_aligned(const View& x) {
  return (reinterpret_cast<int64_t>(x.data) | x.batch | x.head | x.seq) % kChunk == 0 && x.dim == 2;
}

template <int D>
DEVICE unsigned place(unsigned row, unsigned chunk) {
  static_assert(D % 64 == 0, "the swizzle permutes eight chunks");
  return (row * (D / 8) + (chunk ^ (row & 7))) * kChunk;
}

DEVICE uint4 gather(const char* at, int64_t stride, int count) {
  uint16_t x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? load_global<uint16_t>(at + i * stride) : uint16_t(0);
  return {x[0] | uint32_t(x[1]) << 16, x[2] | uint32_t(x[3]) << 16, x[4] | uint32_t(x[5]) << 16,
          x[6] | uint32_t(x[7]) << 16};
}

DEVICE void scatter(char* at, int64_t stride, int count, uint4 x) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) store_global(at + i * stride, uint16_t(words[i / 2] >> i % 2 * 16));
}

// ROWS rows from `from` on; those outside [first, last), and columns from `columns` on, become 0.
template <int D, int ROWS, int THREADS, bool ANY_LAYOUT>
DEVICE void load_tile(char* tile, const View& x, const char* from, int first, int last, int columns) {
  constexpr int kChunks = D / 8, kRows = THREADS / kChunks;  // of a pass
  static_assert(THREADS % kChunks == 0 && ROWS % kRows == 0, "a pass fills whole rows");
  const int chunk = int(thread_index() % kChunks), count = int(clamp(columns - chunk * 8, 0, 8));
  int row = int(thread_index() / kChunks);
  if (ANY_LAYOUT && !is_aligned(x)) {
#pragma unroll 1
    for (; row < ROWS; row += kRows)
      store_shared(tile + place<D>(row, chunk),
                   gather(from + row * x.seq + chunk * 8 * x.dim, x.dim, row >= first && row < last ? count : 0));
    return;
  }
  const char* at = from + row * x.seq + chunk * kChunk;  // one pointer: a product a row spills
#pragma unroll
  for (int i = 0; i < ROWS / kRows; ++i, row += kRows, at += kRows * x.seq)
    copy16(tile + place<D>(row, chunk), at, row >= first && row < last ? count * 2 : 0);
}

template <int TILES, int N>
DEVICE void clear(float (&x)[TILES][N][4]) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < N; ++i) x[t][i][0] = x[t][i][1] = x[t][i][2] = x[t][i][3] = 0.0f;
}

// x (16 TILES x N) += a b^T, where the rows of a begin at `row`.
template <class T, int D, int N, int TILES>
DEVICE void add_transposed_product(float (&x)[TILES][N / 8][4], const char* a, int row, const char* b) {
  const unsigned lane = lane_index();
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) load_matrices(left[t], a + place<D>(row + t * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      load_matrices(right, b + place<D>(n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply_add(T(), x[t][2 * n], left[t], right[0], right[1]);
        multiply_add(T(), x[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// x (16 TILES x COLUMNS) += w b, with w rounded to 16 bits, of the columns of b from first_chunk on.
template <class T, int D, int N, int TILES, int COLUMNS = D>
DEVICE void add_product(float (&x)[TILES][COLUMNS / 8][4], const float (&w)[TILES][N / 8][4], const char* b,
                        int first_chunk = 0) {
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
      load_matrices_transposed(right, b + place<D>(k * 16 + lane % 16, first_chunk + n * 2 + lane / 16));
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply_add(T(), x[t][2 * n], left[t], right[0], right[1]);
        multiply_add(T(), x[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// A warp's 16 rows, each times its factor, to rows [row, row + 16) of a tensor, of which `last` and those after it do
// not exist. They pass through the same rows of a tile in shared memory, which are the warp's own.
template <class T, int D, bool ANY_LAYOUT, int COLUMNS = D>
DEVICE void store_rows(const View& out, char* to, char* tile, int row, int last, int columns,
                       const float (&x)[COLUMNS / 8][4], const float (&factor)[2]) {
  sync_warp();
#pragma unroll
  for (int i = 0; i < COLUMNS / 8; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_shared(tile + place<D>(row + fragment_row(r), i) + lane_index() % 4 * 4,
                   pack(T(), x[i][2 * r] * factor[r], x[i][2 * r + 1] * factor[r]));
  sync_warp();
  constexpr int kChunks = COLUMNS / 8;
#pragma unroll 4
  for (int i = int(lane_index()); i < 16 * kChunks; i += 32) {
    const int from = row + i / kChunks, chunk = i % kChunks;
    const int count = from < last ? int(clamp(columns - chunk * 8, 0, 8)) : 0;
    if (count == 0) continue;
    const uint4 numbers = load_shared<uint4>(tile + place<D>(from, chunk));
    if (!ANY_LAYOUT)
      store_global(to + from * out.seq + chunk * kChunk, numbers);
    else if (count == 8 && is_aligned(out))
      store_global(to + from * out.seq + chunk * kChunk, numbers);
    else
      scatter(to + from * out.seq + chunk * 8 * out.dim, out.dim, count, numbers);
  }
}
