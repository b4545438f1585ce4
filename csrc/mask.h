// Which pairs are visible: every row sees an interval of keys, and intervals of neighbouring rows are one key apart.
//
//   row i sees [max(start, i + first), min(end, i + last + 1))
//   first = offset - window_left, last = offset + window_right
#pragma once

#include "attention.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// A number that the caller's tensor holds.
#ifdef SIMT_SHIM
#include "primitives.h"
inline int64_t read(const int64_t* at) { return load_global<int64_t>(at); }
#else
HOST_DEVICE inline int64_t read(const int64_t* at) { return *at; }
#endif

HOST_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
HOST_DEVICE inline int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return smaller(larger(x, lo), hi); }

// [lo, hi), empty where lo >= hi.
struct Interval {
  int64_t lo, hi;

  HOST_DEVICE bool empty() const { return lo >= hi; }
  HOST_DEVICE bool contains(Interval other) const { return lo <= other.lo && other.hi <= hi; }
  HOST_DEVICE Interval intersect(Interval other) const { return {larger(lo, other.lo), smaller(hi, other.hi)}; }
};

// Which rows of q and k belong to a batch member.
struct Member {
  int64_t batch, first_q, seqlen_q, first_k, seqlen_k;  // the first ones are not 0 in packed sequences alone
};

// cu_seqlens are untrusted: members are cut to the rows there are, and never negative.
HOST_DEVICE inline Member member_of(const AttentionParams& p, int64_t batch) {
  if (!p.cu_seqlens_q) return {batch, 0, p.seqlen_q, 0, p.seqlen_k};
  const int64_t first_q = clamp(read(p.cu_seqlens_q + batch), 0, p.seqlen_q);
  const int64_t first_k = clamp(read(p.cu_seqlens_k + batch), 0, p.seqlen_k);
  return {batch, first_q, clamp(read(p.cu_seqlens_q + batch + 1), first_q, p.seqlen_q) - first_q, first_k,
          clamp(read(p.cu_seqlens_k + batch + 1), first_k, p.seqlen_k) - first_k};
}

// What the rows of one batch member see.
struct Visibility {
  int64_t start, end, first, last, offset;

  // Keys that at least one of the rows sees.
  HOST_DEVICE Interval keys_of_any(Interval rows) const {
    return {larger(start, rows.lo + first), smaller(end, rows.hi + last)};
  }

  // Keys that all of the rows see.
  HOST_DEVICE Interval keys_of_all(Interval rows) const {
    return {larger(start, rows.hi - 1 + first), smaller(end, rows.lo + last + 1)};
  }

  // Rows that see at least one of the keys.
  HOST_DEVICE Interval rows_of_any(Interval keys, int64_t seqlen_q) const {
    const Interval seen = keys.intersect({start, end});
    if (seen.empty()) return {0, 0};
    return Interval{seen.lo - last, seen.hi - first}.intersect({0, seqlen_q});
  }
};

// The values are untrusted: lengths are cut to [0, seqlen_k], and far offsets and windows so that sums stay inside
// int64.
HOST_DEVICE inline Visibility visibility(const AttentionParams& p, const Member& m) {
  constexpr int64_t kFar = int64_t{1} << 61;
  const int64_t start = p.starts ? clamp(read(p.starts + m.batch * p.kv_stride), 0, m.seqlen_k) : 0;
  const int64_t end = p.ends ? clamp(read(p.ends + m.batch * p.kv_stride), 0, m.seqlen_k) : m.seqlen_k;
  const int64_t given = p.offsets ? read(p.offsets + m.batch) : p.has_offset ? p.offset : end - m.seqlen_q;
  const int64_t offset = clamp(given, -kFar, kFar);
  return {start, end, p.window_left == kUnbounded ? -2 * kFar : offset - smaller(p.window_left, kFar),
          p.window_right == kUnbounded ? 2 * kFar : offset + smaller(p.window_right, kFar), offset};
}
