// Between tensors of any strides and the kernels' scratch, where queries are lanes: everything there is transposed.

// Rows that can be loaded in whole vectors.
struct Rows {
  const Real* data;
  int64_t row;
};

constexpr int64_t blocks_of(int64_t size, int64_t count) { return (count + size - 1) / size; }
constexpr int64_t whole_vectors(int64_t count) { return blocks_of(kWidth, count) * kWidth; }

// Fetches rows that are needed soon into the cache. A row past the end does no harm.
INLINE void prefetch(const char* first, int64_t rows, int64_t row_stride, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(first + r * row_stride + at);
}

// Where the rows of a vector of lanes begin. Where they are all there, dense and of Reals, each is loaded and stored in
// whole vectors without a test, which a short sequence would notice.
template <class Byte>
struct VectorRows {
  Byte* at[kWidth];  // null past the last query
  bool plain;

  template <class Row>
  INLINE VectorRows(const View& x, int first_lane, Row&& row) {
    for (int i = 0; i < kWidth; ++i) at[i] = row(first_lane + i);
    plain = x.element == kReal && x.dim == int64_t(sizeof(Real)) && at[kWidth - 1];
  }
};

// to[d][lane] = factor * row(lane)[d], where row(lane) is null past the last query.
template <int N, class Row>
INLINE void load_transposed(Real* to, int64_t dims, const View& x, Real factor, Row&& row) {
  for (int n = 0; n < N; ++n) {
    const VectorRows<const char> from(x, n * kWidth, row);
    for (int64_t d = 0; d < dims; d += kWidth) {
      Vec rows[kWidth];
      if (from.plain && d + kWidth <= dims)
        repeat<kWidth>(EACH(i) { rows[i] = load(reinterpret_cast<const Real*>(from.at[i]) + d) * factor; });
      else
        for (int i = 0; i < kWidth; ++i)
          rows[i] = from.at[i] ? load_elements(x.element, from.at[i] + d * x.dim, x.dim, dims - d) * factor : Vec{};
      transpose(rows);
      for (int i = 0; i < kWidth && d + i < dims; ++i) store(to + (d + i) * N * kWidth + n * kWidth, rows[i]);
    }
  }
}

// row(lane)[d] = factor[lane] * from[d][lane]
template <int N, class Row>
INLINE void store_transposed(const Real* from, int64_t dims, const View& x, const Vec (&factor)[N], Row&& row) {
  for (int n = 0; n < N; ++n) {
    const VectorRows<char> to(x, n * kWidth, row);
    for (int64_t d = 0; d < dims; d += kWidth) {
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i)
        rows[i] = d + i < dims ? load(from + (d + i) * N * kWidth + n * kWidth) * factor[n] : Vec{};
      transpose(rows);
      if (to.plain && d + kWidth <= dims)
        repeat<kWidth>(EACH(i) { store(reinterpret_cast<Real*>(to.at[i]) + d, rows[i]); });
      else
        for (int i = 0; i < kWidth; ++i)
          if (to.at[i]) store_row(x.element, to.at[i] + d * x.dim, x.dim, dims - d, rows[i]);
    }
  }
}

// to[r][d] = from[r][d] as Reals, each row in whole vectors.
inline void copy_rows(Real* to, const View& x, const char* from, int64_t rows, int64_t dims) {
  for (int64_t r = 0; r < rows; ++r, from += x.seq, to += whole_vectors(dims))
    for (int64_t d = 0; d < dims; d += kWidth) store(to + d, load_row(x.element, from + d * x.dim, x.dim, dims - d));
}

// Rows as Reals: where they are, or copied to `copy`.
INLINE Broadcast real_rows(const View& x, const char* from, int64_t rows, int64_t dims, Real* copy) {
  if (x.element == kReal)
    return {reinterpret_cast<const Real*>(from), x.seq / int64_t(sizeof(Real)), x.dim / int64_t(sizeof(Real))};
  copy_rows(copy, x, from, rows, dims);
  return {copy, whole_vectors(dims), 1};
}

// Whether none of the elements of rows is infinite or NaN; row(r) is where one begins.
template <class Row>
INLINE bool all_rows_finite(const View& x, int64_t rows, int64_t dims, Row&& row) {
  Vec check{};
  BitVec found{};
  for (int64_t r = 0; r < rows; ++r) {
    const char* const from = row(r);
    int64_t d = 0;
#if !defined(REAL_IS_DOUBLE)
    for (; is_dense_half(x.element, x.dim, dims - d) && d + 2 * kWidth <= dims; d += 2 * kWidth)
      found |= not_finite(x.element, read<BitVec>(from + d * x.dim));
#endif
    for (; d < dims; d += kWidth) {
      const Vec elements = load_elements(x.element, from + d * x.dim, x.dim, dims - d);
      check += elements - elements;
    }
  }
  return all_zero(check) && all_zero(__builtin_convertvector(found, Vec));
}

inline bool all_rows_finite(const View& x, const char* from, int64_t rows, int64_t dims) {
  return all_rows_finite(x, rows, dims, [&](int64_t r) INLINE_LAMBDA { return from + r * x.seq; });
}
