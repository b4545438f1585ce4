// Between tensors of any strides and the kernels' scratch, where queries are lanes: everything there is transposed.

// Rows that can be loaded in whole vectors.
struct Rows {
  const float* data;
  int64_t row;
};

constexpr int64_t blocks_of(int64_t size, int64_t count) { return (count + size - 1) / size; }

// Fetches rows that are needed soon into the cache. A row past the end does no harm.
INLINE void prefetch(const float* first, int64_t rows, int64_t row_stride, int64_t dims) {
  constexpr int64_t kCacheLine = 16;  // floats
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dims; d += kCacheLine) __builtin_prefetch(first + r * row_stride + d);
}

// to[d][lane] = scale * row(lane)[d], where row(lane) is null past the last query.
template <int N, class Row>
INLINE void load_transposed(float* to, int64_t dims, int64_t stride, float scale, Row&& row) {
  for (int n = 0; n < N; ++n)
    for (int64_t d = 0; d < dims; d += kWidth) {
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const float* from = row(n * kWidth + i);
        rows[i] = from ? load_some(from + d * stride, stride, dims - d) * scale : Vec{};
      }
      transpose(rows);
      for (int i = 0; i < kWidth && d + i < dims; ++i) store(to + (d + i) * N * kWidth + n * kWidth, rows[i]);
    }
}

// row(lane)[d] = factor[lane] * from[d][lane]
template <int N, class Row>
INLINE void store_transposed(const float* from, int64_t dims, int64_t stride, const Vec (&factor)[N], Row&& row) {
  for (int n = 0; n < N; ++n)
    for (int64_t d = 0; d < dims; d += kWidth) {
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i)
        rows[i] = d + i < dims ? load(from + (d + i) * N * kWidth + n * kWidth) * factor[n] : Vec{};
      transpose(rows);
      for (int i = 0; i < kWidth; ++i)
        if (float* to = row(n * kWidth + i)) store_some(to + d * stride, stride, dims - d, rows[i]);
    }
}

// Whether none of a matrix's elements is infinite or NaN.
inline bool all_rows_finite(const float* data, int64_t rows, int64_t row_stride, int64_t dims, int64_t stride) {
  Vec check{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dims; d += kWidth) {
      const Vec x = load_some(data + r * row_stride + d * stride, stride, dims - d);
      check += x - x;
    }
  return all_zero(check);
}
