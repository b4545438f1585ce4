// csrc/cuda/prims.cuh where the machine is a CPU: the same names, each of them checked and then carried out.
//
// Sums of mma are in fp32, one term after the other. Source of what the instructions do: NVIDIA, PTX ISA 9.0, 9.7.14
// and 9.7.15.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "machine.h"

using std::max;
using std::min;

#define DEVICE inline
#define KERNEL(threads) static void
#define ARGUMENT const
#define SHARED(name) char* const name = shared_memory.begin()

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

DEVICE unsigned thread_index() { return machine.running; }
DEVICE int64_t block_index() { return machine.block; }

DEVICE void sync_block() { machine.meet(&block_barrier); }
DEVICE void sync_warp() { machine.meet(&warp_barrier); }

DEVICE bool sync_block_or(bool x) {
  bool any;
  machine.meet(&block_barrier, &x, nullptr, &any);
  return any;
}

template <class U>
DEVICE U shuffle_xor(U x, int lanes) {
  U result;
  const auto exchange = [](Thread* warp) {
    for (int lane = 0; lane < 32; ++lane)
      *static_cast<U*>(warp[lane].out) =
          *static_cast<const U*>(warp[lane ^ *static_cast<const int*>(warp[lane].more)].in);
  };
  machine.meet(exchange, &x, &lanes, &result);
  return result;
}

template <class U>
DEVICE U load_shared(const void* at) {
  U x{};
  if (shared_memory.access(at, sizeof(U), false, machine.running)) std::memcpy(&x, at, sizeof(U));
  return x;
}

template <class U>
DEVICE void store_shared(void* at, U x) {
  if (shared_memory.access(at, sizeof(U), true, machine.running)) std::memcpy(at, &x, sizeof(U));
}

template <class U>
DEVICE U load_global(const void* at) {
  U x{};
  if (global_memory.access(at, sizeof(U), false)) std::memcpy(&x, at, sizeof(U));
  return x;
}

template <class U>
DEVICE void store_global(void* at, U x) {
  if (global_memory.access(at, sizeof(U), true)) std::memcpy(at, &x, sizeof(U));
}

// Until somebody waits for it a copy may have happened or not: what lay there is gone, what comes is not there.
DEVICE void copy16(void* to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) findings.add(kOutside, "a copy of " + std::to_string(bytes) + " bytes");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16) findings.add(kMisaligned, "a copy from an odd address");
  bool readable = true;  // elements of two bytes, for a row may end anywhere
  for (int i = 0; i < bytes; i += 2) readable &= global_memory.access(static_cast<const char*>(from) + i, 2, false);
  if (!shared_memory.access(to, 16, true, machine.running)) return;
  std::memset(to, 0xff, 16);
  machine.thread().open.push_back({to, from, readable ? bytes : 0});
}

DEVICE void commit_copies() {
  Thread& me = machine.thread();
  me.committed.push_back(std::move(me.open));
  me.open.clear();
}

template <int kPending>
DEVICE void wait_copies() {
  auto& groups = machine.thread().committed;
  for (; groups.size() > kPending; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front()) {
      shared_memory.access(copy.to, 16, true, machine.running);
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

// Lane l gets of each matrix elements 2 (l mod 4) and the next of row l div 4, of its transpose with kTransposed.
template <bool kTransposed>
inline void carry_out_loads(Thread* warp) {
  findings.counts[kLoads]++;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t x[8][8] = {};
    unsigned groups = 0;
    for (int row = 0; row < 8; ++row) {
      const Thread& lane = warp[matrix * 8 + row];
      const auto group = reinterpret_cast<uintptr_t>(lane.in) / 16 % 8;
      if (groups >> group & 1) findings.add(kBankConflict, "rows of a matrix share a group of banks");
      groups |= 1u << group;
      if (shared_memory.access(lane.in, 16, false, lane.number)) std::memcpy(x[row], lane.in, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = kTransposed ? x[j][i] : x[i][j], high = kTransposed ? x[j + 1][i] : x[i][j + 1];
      static_cast<uint32_t*>(warp[lane].out)[matrix] = low | uint32_t(high) << 16;
    }
  }
}

DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { machine.meet(&carry_out_loads<false>, row, nullptr, r); }
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  machine.meet(&carry_out_loads<true>, row, nullptr, r);
}

DEVICE float widen(BFloat16, uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float r;
  std::memcpy(&r, &bits, 4);
  return r;
}

DEVICE float widen(Float16, uint16_t x) {
  _Float16 r;
  std::memcpy(&r, &x, 2);
  return r;
}

inline uint16_t narrow(BFloat16, float x) {
  if (x != x) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t narrow(Float16, float x) {
  const auto r = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &r, 2);
  return bits;
}

template <class T>
DEVICE uint32_t pack(T, float low, float high) {
  return narrow(T(), low) | uint32_t(narrow(T(), high)) << 16;
}

struct Place {
  int row, column;
};

// Where register j of a lane's operand of mma lies in the matrix: of two numbers of 16 bits the lower or upper `half`,
// or one number of 32.
inline Place place_of_left(int bits, int lane, int j, int half) {
  const int g = lane / 4, q = lane % 4;
  return {g + j % 2 * 8, bits == 16 ? q * 2 + j / 2 * 8 + half : q + j / 2 * 4};
}

inline Place place_of_right(int bits, int lane, int j, int half) {
  const int g = lane / 4, q = lane % 4;
  return {bits == 16 ? q * 2 + j * 8 + half : q + j * 4, g};
}

inline Place place_of_sum(int lane, int j) { return {lane / 4 + j / 2 * 8, lane % 4 * 2 + j % 2}; }

// c += a b, of which each lane holds four sums.
template <size_t K>
inline void add_up(Thread* warp, const float (&a)[16][K], const float (&b)[K][8]) {
  float c[16][8];
  const auto sum = [&](int lane, int j) -> float& {
    const Place at = place_of_sum(lane, j);
    return c[at.row][at.column];
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j) sum(lane, j) = static_cast<const float*>(warp[lane].out)[j];
  for (int i = 0; i < 16; ++i)
    for (size_t k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j) static_cast<float*>(warp[lane].out)[j] = sum(lane, j);
}

inline float as_float(uint32_t bits) {
  float r;
  std::memcpy(&r, &bits, 4);
  return r;
}

inline uint32_t as_bits(float x) {
  uint32_t r;
  std::memcpy(&r, &x, 4);
  return r;
}

DEVICE uint32_t leading(float x) { return x != x ? 0x7fffffff : (as_bits(x) + 0x1000) & 0xffffe000; }

// Each lane's registers to the matrices they are of; number(bits, half) is what a register holds.
template <int kBits, size_t K, class Number>
inline void collect(Thread* warp, float (&a)[16][K], float (&b)[K][8], Number&& number) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto* left = static_cast<const uint32_t*>(warp[lane].in);
    const auto* right = static_cast<const uint32_t*>(warp[lane].more);
    for (int half = 0; half < 32 / kBits; ++half) {
      for (int j = 0; j < 4; ++j) {
        const Place at = place_of_left(kBits, lane, j, half);
        a[at.row][at.column] = number(left[j], half);
      }
      for (int j = 0; j < 2; ++j) {
        const Place at = place_of_right(kBits, lane, j, half);
        b[at.row][at.column] = number(right[j], half);
      }
    }
  }
}

template <class T>
inline void carry_out_product(Thread* warp) {
  findings.counts[kProducts]++;
  float a[16][16], b[16][8];
  collect<16>(warp, a, b, [](uint32_t bits, int half) { return widen(T(), uint16_t(bits >> half * 16)); });
  add_up(warp, a, b);
}

// Of numbers whose last 13 bits the machine does not see.
inline void carry_out_leading_product(Thread* warp) {
  findings.counts[kProducts]++;
  float a[16][8], b[8][8];
  collect<32>(warp, a, b, [](uint32_t bits, int) { return as_float(bits & 0xffffe000); });
  add_up(warp, a, b);
}

template <class T>
DEVICE void multiply_add(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  machine.meet(&carry_out_product<T>, a, b, c);
}

DEVICE void multiply_add_leading(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  machine.meet(&carry_out_leading_product, a, b, c);
}

DEVICE float power_of_2(float x) { return std::exp2(x); }
DEVICE float infinity() { return std::numeric_limits<float>::infinity(); }
DEVICE float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
