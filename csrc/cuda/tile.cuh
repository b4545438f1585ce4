// Tiles of rows, in shared memory and as the fragments of mma.
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

constexpr int kChunk = 16;  // bytes

template <class T>
constexpr int kPerChunk = kChunk / kBytes<T>;

DEVICE unsigned lane_index() { return thread_index() % 32; }
DEVICE int warp_index() { return int(thread_index() / 32); }
DEVICE int fragment_row(int r) { return int(lane_index() / 4) + r * 8; }
DEVICE int fragment_column(int i, int e) { return i * 8 + int(lane_index() % 4) * 2 + (e & 1); }

DEVICE char* row_of(const View& x, int64_t batch, int64_t head, int64_t row) {
  return x.data + batch * x.batch + head * x.head + row * x.seq;
}

// Whether the chunks of every row can be read and written as a whole.
template <class T>
HOST_DEVICE inline bool is_aligned(const View& x) {
  return (reinterpret_cast<int64_t>(x.data) | x.batch | x.head | x.seq) % kChunk == 0 && x.dim == kBytes<T>;
}

// Of a row of D elements.
template <class T, int D>
DEVICE unsigned place(unsigned row, unsigned chunk) {
  static_assert(D / kPerChunk<T> % 8 == 0, "the swizzle permutes eight chunks");
  return (row * (D / kPerChunk<T>)+(chunk ^ (row & 7))) * kChunk;
}

template <class T>
DEVICE uint4 gather(const char* at, int64_t stride, int count) {
  uint32_t x[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i)
    if (i < count) {
      if constexpr (kBytes<T> == 4)
        x[i] = load_global<uint32_t>(at + i * stride);
      else
        x[i / 2] |= uint32_t(load_global<uint16_t>(at + i * stride)) << i % 2 * 16;
    }
  return {x[0], x[1], x[2], x[3]};
}

template <class T>
DEVICE void scatter(char* at, int64_t stride, int count, uint4 x) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i)
    if (i < count) {
      if constexpr (kBytes<T> == 4)
        store_global(at + i * stride, words[i]);
      else
        store_global(at + i * stride, uint16_t(words[i / 2] >> i % 2 * 16));
    }
}

// ROWS rows from `from` on; those outside [first, last), and columns from `columns` on, become 0.
template <class T, int D, int ROWS, int THREADS, bool ANY_LAYOUT>
DEVICE void load_tile(char* tile, const View& x, const char* from, int first, int last, int columns) {
  constexpr int kChunks = D / kPerChunk<T>, kRows = THREADS / kChunks;  // of a pass
  static_assert(THREADS % kChunks == 0 && ROWS % kRows == 0, "a pass fills whole rows");
  const int chunk = int(thread_index() % kChunks), begin = chunk * kPerChunk<T>;
  const int count = int(clamp(columns - begin, 0, kPerChunk<T>));
  int row = int(thread_index() / kChunks);
  if (ANY_LAYOUT && !is_aligned<T>(x)) {
#pragma unroll 1
    for (; row < ROWS; row += kRows)
      store_shared(tile + place<T, D>(row, chunk),
                   gather<T>(from + row * x.seq + begin * x.dim, x.dim, row >= first && row < last ? count : 0));
    return;
  }
  const char* at = from + row * x.seq + chunk * kChunk;  // one pointer: a product a row spills
#pragma unroll
  for (int i = 0; i < ROWS / kRows; ++i, row += kRows, at += kRows * x.seq)
    copy16(tile + place<T, D>(row, chunk), at, row >= first && row < last ? count * kBytes<T> : 0);
}

template <int TILES, int N>
DEVICE void clear(float (&x)[TILES][N][4]) {
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < N; ++i) x[t][i][0] = x[t][i][1] = x[t][i][2] = x[t][i][3] = 0.0f;
}

// Two neighbours of a row, in columns 8 i + 2 (lane mod 4) + {0, 1}.
template <class T, int D>
DEVICE void store_pair(char* tile, int row, int i, float low, float high) {
  const unsigned lane = lane_index() % 4;
  if constexpr (kBytes<T> == 4) {
    char* const at = tile + place<T, D>(row, i * 2 + lane / 2) + lane % 2 * 8;
    store_shared(at, low), store_shared(at + 4, high);
  } else {
    store_shared(tile + place<T, D>(row, i) + lane * 4, pack(T(), low, high));
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
      store_pair<T, D>(tile, row + fragment_row(r), i, x[i][2 * r] * factor[r], x[i][2 * r + 1] * factor[r]);
  sync_warp();
  constexpr int kChunks = COLUMNS / kPerChunk<T>;
#pragma unroll 4
  for (int i = int(lane_index()); i < 16 * kChunks; i += 32) {
    const int from = row + i / kChunks, chunk = i % kChunks, begin = chunk * kPerChunk<T>;
    const int count = from < last ? int(clamp(columns - begin, 0, kPerChunk<T>)) : 0;
    if (count == 0) continue;
    const uint4 numbers = load_shared<uint4>(tile + place<T, D>(from, chunk));
    if (!ANY_LAYOUT)
      store_global(to + from * out.seq + chunk * kChunk, numbers);
    else if (count == kPerChunk<T> && is_aligned<T>(out))
      store_global(to + from * out.seq + chunk * kChunk, numbers);
    else
      scatter<T>(to + from * out.seq + begin * out.dim, out.dim, count, numbers);
  }
}
