// Which tiles the kernels work in, by the bytes of an element, by the columns D that a row is rounded up to, and by
// whether there are options, which take registers.
//
// All fit into the 99 KB of shared memory that a block may have on every architecture from sm_80 on.
#pragma once

// M queries by N keys. Of the backward's passes `stages` tiles are loaded ahead of each other, and `split` blocks share
// the columns of dk and dv, which one's registers do not hold.
struct Tiles {
  int m, n, stages = 2, split = 1;
};

constexpr Tiles forward_tiles(int bytes, int D, bool options) {
  if (bytes == 4) return {64, D == 256 ? 16 : 32};
  if (options) return {64, D == 256 ? 32 : 64};
  return {D == 256 ? 64 : 128, D == 64 ? 64 : 32};
}

constexpr Tiles key_tiles(int bytes, int D, bool options) {
  if (bytes == 4) return D == 64 ? Tiles{32, 64} : D == 128 ? Tiles{16, 64} : Tiles{16, 32, 1, 2};
  return D == 64 ? Tiles{options ? 32 : 64, 64} : D == 128 ? Tiles{32, 64} : Tiles{16, 64, 2, 2};
}

constexpr Tiles query_tiles(int bytes, int D, bool options) {
  if (bytes == 4) return D == 64 ? Tiles{64, 32} : D == 128 ? Tiles{64, 16} : Tiles{32, 16, 1};
  return {64, D == 64 && !options ? 64 : D == 256 ? 16 : 32};
}

constexpr Tiles bias_tiles(int bytes, int D) { return bytes == 4 && D == 256 ? Tiles{32, 16} : Tiles{64, 32}; }

// Of a block that reads a split of the keys, each with its own keys in two stages.
constexpr int split_warps(int bytes, int D) { return bytes * D <= 256 ? 4 : bytes * D == 512 ? 2 : 1; }
