// What the products of forward are made of: Reals, or pairs of bfloat16 that a dot instruction multiplies.
//
//   S' = keys queries        O' = values' weights

struct RealOperands {
  using Product = Fma;

  static constexpr int64_t steps(int64_t count) { return count; }

  // Q', scaled.
  template <int N, class Row>
  static INLINE void load_queries(Real* to, Real*, int64_t dims, const View& q, Real scale, Row&& row) {
    load_transposed<N>(to, dims, q, scale, row);
  }
  static INLINE Vec scaled(Vec score, Real) { return score; }

  static INLINE Broadcast keys(const View& x, const char* from, int64_t rows, int64_t dims, Real* copy) {
    return real_rows(x, from, rows, dims, copy);
  }
  static INLINE Broadcast values(const View& x, const char* from, int64_t rows, int64_t dims, Real* copy) {
    return real_rows(x, from, rows, dims, copy);
  }
  template <int N>
  static INLINE void prepare_weights(Real*, int64_t) {}

  // The bits of a step of values that the lanes see, where sees(key) is what they see of a key.
  template <class F>
  static INLINE IntVec shown(int64_t step, int64_t, F&& sees) {
    return sees(step);
  }
};

#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
struct PairOperands {
  using Product = PairDot;

  static constexpr int64_t steps(int64_t count) { return blocks_of(2, count); }

  // [pair of dims][lane]; the scale comes later, for it would have to be rounded here.
  template <int N, class Row>
  static INLINE void load_queries(float* to, float* spare, int64_t dims, const View& q, float, Row&& row) {
    constexpr int64_t kRow = N * kWidth;
    load_transposed<N>(spare, dims, q, 1.0f, row);
    for (int64_t d = 0; d < dims; d += 2)
      for (int64_t lane = 0; lane < kRow; lane += kWidth)
        store(to + d / 2 * kRow + lane,
              pair_up(load(spare + d * kRow + lane), d + 1 < dims ? load(spare + (d + 1) * kRow + lane) : Vec{}));
  }
  static INLINE Vec scaled(Vec score, float scale) { return score * scale; }

  // [row][pair of dims]: in place where memory holds the pairs already.
  static INLINE Broadcast keys(const View& x, const char* from, int64_t rows, int64_t dims, float* copy) {
    if (x.dim == 2 && dims % 2 == 0 && x.seq % 4 == 0) return {reinterpret_cast<const float*>(from), x.seq / 4, 1};
    const int64_t units = blocks_of(2, dims);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t u = 0; u < units; ++u) {
        const char* const at = from + r * x.seq + 2 * u * x.dim;
        const uint32_t low = read<uint16_t>(at), high = 2 * u + 1 < dims ? read<uint16_t>(at + x.dim) : 0;
        const uint32_t unit = low | high << 16;
        std::memcpy(copy + r * units + u, &unit, sizeof(unit));
      }
    return {copy, units, 1};
  }

  // [pair of rows][dim]; an odd last row is paired with zeros.
  static INLINE Broadcast values(const View& x, const char* from, int64_t rows, int64_t dims, float* copy) {
    const int64_t width = whole_vectors(dims);
    for (int64_t r = 0; r < rows; r += 2, from += 2 * x.seq)
      for (int64_t d = 0; d < dims; d += kWidth) {
        const char* const at = from + d * x.dim;
        if (r + 1 < rows && is_dense_half(x.element, x.dim, dims - d)) {
          const BitVec low = __builtin_convertvector(read<HalfVec>(at), BitVec);
          const BitVec high = __builtin_convertvector(read<HalfVec>(at + x.seq), BitVec);
          store(copy + r / 2 * width + d, (Vec)(low | high << 16));
          continue;
        }
        const Vec low = load_elements(Element::kBFloat16, at, x.dim, dims - d);
        const Vec high = r + 1 < rows ? load_elements(Element::kBFloat16, at + x.seq, x.dim, dims - d) : Vec{};
        store(copy + r / 2 * width + d, pair_up(low, high));
      }
    return {copy, width, 1};
  }

  // [pair of keys][lane] in place, rounded to the nearest and half a unit upwards: 3 operations a vector less.
  template <int N>
  static INLINE void prepare_weights(float* weights, int64_t keys) {
    constexpr int64_t kRow = N * kWidth;
    for (int64_t j = 0; j < keys; j += 2)
      for (int64_t lane = 0; lane < kRow; lane += kWidth) {
        const float* const from = weights + j * kRow + lane;
        const Vec low = load(from), high = j + 1 < keys ? load(from + kRow) : Vec{};
        store(weights + j / 2 * kRow + lane, pair_up((Vec)((BitVec)low + 0x8000u), (Vec)((BitVec)high + 0x8000u)));
      }
  }

  template <class F>
  static INLINE IntVec shown(int64_t step, int64_t keys, F&& sees) {
    const IntVec low = sees(2 * step), high = 2 * step + 1 < keys ? sees(2 * step + 1) : IntVec{};
    return (IntVec)((BitVec)low >> 16 | ((BitVec)high & 0xffff0000u));
  }

 private:
  // bfloat16 values as pairs, the first in the lower halves.
  static INLINE Vec pair_up(Vec low, Vec high) { return (Vec)((BitVec)low >> 16 | ((BitVec)high & 0xffff0000u)); }
};
#endif
