// Rows of floats in vectors: whole ones without a test, and what is left of a row at its end.

struct AllLanes {
  INLINE Vec load_from(const float* from) const { return load(from); }
  INLINE void store_to(float* to, Vec x) const { store(to, x); }
  INLINE Vec only(Vec x) const { return x; }
};

struct FirstLanes {
  int64_t count;

  INLINE Vec load_from(const float* from) const { return load_some(from, 1, count); }
  INLINE void store_to(float* to, Vec x) const { store_some(to, 1, count, x); }

  // x with 0 in the other lanes.
  INLINE Vec only(Vec x) const {
    for (int i = 0; i < kWidth; ++i) x[i] = i < count ? x[i] : 0.0f;
    return x;
  }
};

// Calls f(first element, lanes) for every vector of a row.
template <class F>
INLINE void for_vectors(int64_t width, F&& f) {
  int64_t c = 0;
#pragma GCC unroll 4
  for (; c + kWidth <= width; c += kWidth) f(c, AllLanes{});
  if (c < width) f(c, FirstLanes{width - c});
}

// The sum of all lanes, by halves.
INLINE float total(Vec x) {
#pragma GCC unroll 4
  for (int lanes = 1; lanes < kWidth; lanes *= 2)
    x = interleave(x, x, make_int_list<kWidth>{}, false) + interleave(x, x, make_int_list<kWidth>{}, true);
  return x[0];
}

// N sums over a row: f(first element, lanes, sums) adds a vector's share to each. Vectors take turns at four sets of
// sums, for one would wait for itself.
template <int N, class F>
INLINE void sum_row(int64_t width, float (&totals)[N], F&& f) {
  Vec sums[4][N] = {};
  int64_t c = 0;
  for (; c + 4 * kWidth <= width; c += 4 * kWidth) repeat<4>(EACH(i) { f(c + i * kWidth, AllLanes{}, sums[i]); });
  for (; c + kWidth <= width; c += kWidth) f(c, AllLanes{}, sums[0]);
  if (c < width) f(c, FirstLanes{width - c}, sums[1]);
  for (int n = 0; n < N; ++n) totals[n] = total((sums[0][n] + sums[1][n]) + (sums[2][n] + sums[3][n]));
}
