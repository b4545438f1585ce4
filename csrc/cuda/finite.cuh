// Values that are not finite: 0 * nan is nan, so a row that some queries do not see must not enter their product.
#pragma once

#include "cuda/tile.cuh"

DEVICE bool is_broken(BFloat16, uint32_t two) { return (two & 0x7f80) == 0x7f80 || (two >> 16 & 0x7f80) == 0x7f80; }
DEVICE bool is_broken(Float16, uint32_t two) { return (two & 0x7c00) == 0x7c00 || (two >> 16 & 0x7c00) == 0x7c00; }
DEVICE bool is_broken(Float32, uint32_t one) { return (one & 0x7f800000) == 0x7f800000; }

template <class T>
DEVICE bool is_broken(T, uint4 x) {
  return is_broken(T(), x.x) || is_broken(T(), x.y) || is_broken(T(), x.z) || is_broken(T(), x.w);
}

// Whether any of the tile's chunks is broken that thread `thread` of THREADS looks at.
template <class T, int D, int ROWS, int THREADS>
DEVICE bool finds_broken(const char* tile, int thread) {
  bool found = false;
#pragma unroll 1
  for (int i = thread; i < ROWS * D / kPerChunk<T>; i += THREADS)
    found |= is_broken(T(), load_shared<uint4>(tile + i * kChunk));
  return found;
}

// Whether any of the tile's rows is broken. For all threads of a block alike, and a barrier.
template <class T, int D, int ROWS, int THREADS>
DEVICE bool any_broken(const char* tile) {
  return sync_block_or(finds_broken<T, D, ROWS, THREADS>(tile, int(thread_index())));
}

// Zeros in place of the broken rows, and which they were, a row a thread. Barriers on both sides are the caller's.
template <class T, int D, int ROWS>
DEVICE void mend_rows(char* tile, int* broken, int row) {
  if (row >= ROWS) return;
  constexpr int kChunks = D / kPerChunk<T>;
  bool found = false;
  for (int c = 0; c < kChunks; ++c) found |= is_broken(T(), load_shared<uint4>(tile + place<T, D>(row, c)));
  store_shared(broken + row, int(found));
  for (int c = 0; c < kChunks && found; ++c) store_shared(tile + place<T, D>(row, c), uint4{0, 0, 0, 0});
}

// Adds to `poisoned`, a bit for each row of the fragment, those of which this lane has a visible pair with a broken
// key.
template <int N>
DEVICE void find_poisoned(const float (&scores)[N][4], const int* broken, int shift, int& poisoned) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (scores[i][e] != -infinity() && load_shared<int>(broken + fragment_column(i, e)))
        poisoned |= 1 << (shift + e / 2);
}
