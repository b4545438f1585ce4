// The one matrix product of every kernel, on a tile of accumulators in registers:
//
//   acc[m][n] += sum_k a[m, k] * b[k, n]      a is broadcast from any strides, b is loaded in vectors
//
// Accumulators indexed by a loop variable would live in memory, so the loops over them are expanded by templates.

// Rows and vectors of a tile: as many accumulators as the registers hold beside one row of b.
#if defined(ISA_AVX512) || defined(__aarch64__)  // 32 registers
constexpr int kTileRows = 8, kTileVectors = 2;
#elif defined(ISA_AVX2)  // 16
constexpr int kTileRows = 4, kTileVectors = 3;
#else                    // 16, and a product needs one for itself where there is no FMA
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
constexpr int kLanes = kTileVectors * kWidth;

template <int... I, class F>
INLINE void expand(int_list<I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void repeat(F&& f) {
  expand(make_int_list<N>{}, f);
}
#define EACH(i) [&](auto i) INLINE_LAMBDA

// How two vectors multiply: element by element,
struct Fma {
  static INLINE Vec broadcast(const Real* from) { return broadcast_from(from); }
  static INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fused(a, b, c); }
};

#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
// or as pairs of bfloat16, which halves the steps. Such a pair takes the place of a float everywhere.
struct PairDot {
  static INLINE Vec broadcast(const float* from) {
    typedef int32_t Pair __attribute__((aligned(2), may_alias));
    return (Vec)_mm512_set1_epi32(*(const Pair*)from);
  }
  static INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};
#endif

// A matrix of any strides whose elements are broadcast.
struct Broadcast {
  const Real* data;
  int64_t row, step;

  INLINE Broadcast rows_from(int64_t m) const { return {data + m * row, row, step}; }
};

template <int M, int N>
struct Tile {
  Vec at[M][N];

  INLINE void clear() {
    repeat<M>(EACH(m) { repeat<N>(EACH(n) { at[m][n] = Vec{}; }); });
  }

  template <class Product = Fma>
  INLINE void multiply_add(Broadcast a, const Real* b, int64_t b_row, int64_t steps) {
    const Real* from = a.data;
    for (int64_t k = 0; k < steps; ++k, from += a.step, b += b_row) {
      Vec row[N];
      repeat<N>(EACH(n) { row[n] = load(b + n * kWidth); });
      repeat<M>(EACH(m) {
        const Vec x = Product::broadcast(from + m * a.row);
        repeat<N>(EACH(n) { at[m][n] = Product::multiply_add(x, row[n], at[m][n]); });
      });
    }
  }

  // The same, except that lane i of vector n sees of a no more than the bits shown(k, n)[i]; where those are none, b
  // must be 0.
  template <class Product = Fma, class F>
  INLINE void multiply_add_where(Broadcast a, const Real* b, int64_t b_row, int64_t steps, F&& shown) {
    for (int64_t k = 0; k < steps; ++k)
      repeat<N>(EACH(n) {
        const IntVec bits = shown(k, n);
        const Vec row = load(b + k * b_row + n * kWidth);
        repeat<M>(EACH(m) {
          const Vec x = Product::broadcast(a.data + m * a.row + k * a.step);
          at[m][n] = Product::multiply_add((Vec)((IntVec)x & bits), row, at[m][n]);
        });
      });
  }

  // The same with b, of which row m sees no more than the bits shown(a[m, k]); where those are none, a must be 0.
  template <class Product = Fma, class F>
  INLINE void multiply_add_terms(Broadcast a, const Real* b, int64_t b_row, int64_t steps, F&& shown) {
    for (int64_t k = 0; k < steps; ++k)
      repeat<M>(EACH(m) {
        const Vec x = Product::broadcast(a.data + m * a.row + k * a.step);
        const IntVec bits = shown(x);
        repeat<N>(EACH(n) {
          const Vec row = (Vec)((IntVec)load(b + k * b_row + n * kWidth) & bits);
          at[m][n] = Product::multiply_add(x, row, at[m][n]);
        });
      });
  }

  // at[m][n] = f(at[m][n], m, n)
  template <class F>
  INLINE void map(F&& f) {
    repeat<M>(EACH(m) { repeat<N>(EACH(n) { at[m][n] = f(at[m][n], m, n); }); });
  }
};

// Calls f(tile height, first row) until all rows are done: full tiles, then halves of halves.
template <int M = kTileRows, class F>
INLINE void for_row_tiles(int64_t first, int64_t rows, F&& f) {
  for (; first + M <= rows; first += M) f(std::integral_constant<int, M>{}, first);
  if constexpr (M > 1) {
    if (first < rows) for_row_tiles<M / 2>(first, rows, f);
  }
}
template <int N = kTileVectors, class F>
INLINE void for_vector_tiles(int64_t first, int64_t vectors, F&& f) {
  for (; first + N <= vectors; first += N) f(std::integral_constant<int, N>{}, first);
  if constexpr (N > 1) {
    if (first < vectors) for_vector_tiles<N - 1>(first, vectors, f);
  }
}
