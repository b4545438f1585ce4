// What the products of forward and backward are made of where a dot instruction multiplies pairs of bfloat16.
//
//   sum += a_low b_low + a_high b_high          the halves are neighbours along what the product sums over

#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
struct PairOperands {
  using Product = PairDot;

  static constexpr int kTerms = 2;

  static constexpr int64_t steps(int64_t count) { return blocks_of(2, count); }

  // [pair of dims][lane]; the scale comes later, for it would have to be rounded here.
  template <int N, class Row>
  static INLINE void load_lanes(float* to, int64_t dims, const View& x, float, Row&& row) {
    for (int n = 0; n < N; ++n) {
      const char* from[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        from[i] = row(n * kWidth + i);
        if (from[i]) prefetch(from[i], 1, 0, 2 * dims);
      }
      for (int64_t d = 0; d < dims; d += 2 * kWidth) {
        Vec rows[kWidth];
        for (int i = 0; i < kWidth; ++i) rows[i] = from[i] ? load_pairs(x, from[i] + d * x.dim, dims - d) : Vec{};
        transpose(rows);
        for (int i = 0; i < kWidth && d + 2 * i < dims; ++i) store(to + ((d / 2 + i) * N + n) * kWidth, rows[i]);
      }
    }
  }
  static INLINE Vec scaled(Vec score, float scale) { return score * scale; }
  static INLINE Vec power_of_2(Vec x) { return exp2_by(kShortExp2Series, x); }

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

  // [pair of rows][dim]
  static INLINE Broadcast values(const View& x, const char* from, int64_t rows, int64_t dims, float* copy) {
    copy_steps(copy, x, from, rows, dims);
    return {copy, whole_vectors(dims), 1};
  }

  // An odd last row is paired with zeros.
  static INLINE void copy_steps(float* to, const View& x, const char* from, int64_t rows, int64_t dims) {
    for (int64_t r = 0; r < rows; r += 2, from += 2 * x.seq, to += whole_vectors(dims)) {
      const bool paired = r + 1 < rows;
      int64_t d = 0;
      for (; paired && x.dim == 2 && d + 2 * kWidth <= dims; d += 2 * kWidth) {
        const Vec low = read<Vec>(from + 2 * d), high = read<Vec>(from + x.seq + 2 * d);
        store(to + d, interleave_lower(low, high)), store(to + d + kWidth, interleave_upper(low, high));
      }
      for (; d < dims; d += kWidth) {
        const char* const at = from + d * x.dim;
        const Vec low = load_row(Element::kBFloat16, at, x.dim, dims - d);
        const Vec high = paired ? load_row(Element::kBFloat16, at + x.seq, x.dim, dims - d) : Vec{};
        store(to + d, (Vec)((BitVec)low >> 16 | (BitVec)high));
      }
    }
  }

  // [pair of keys][lane] in place, rounded.
  template <int N>
  static INLINE void prepare_weights(float* weights, int64_t keys) {
    constexpr int64_t kRow = N * kWidth;
    for (int64_t j = 0; j < keys; j += 2)
      for (int64_t lane = 0; lane < kRow; lane += kWidth) {
        const float* const from = weights + j * kRow + lane;
        const Vec low = load(from), high = j + 1 < keys ? load(from + kRow) : Vec{};
        store(weights + j / 2 * kRow + lane, interleave_halves(round_halves(low, high)));
      }
  }

  // bfloat16 numbers, those of `low` first: rounded to the nearest, ties to even.
  static INLINE Vec round_halves(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh(high, low); }

  // Pairs of numbers half a vector apart, or of two vectors' lower or upper halves.
  static INLINE Vec interleave_halves(Vec x) {
    return (Vec)_mm512_permutexvar_epi16(pairs_from(0, kWidth), (__m512i)x);
  }
  static INLINE Vec interleave_lower(Vec low, Vec high) {
    return (Vec)_mm512_permutex2var_epi16((__m512i)low, pairs_from(0, 2 * kWidth), (__m512i)high);
  }
  static INLINE Vec interleave_upper(Vec low, Vec high) {
    return (Vec)_mm512_permutex2var_epi16((__m512i)low, pairs_from(kWidth, 2 * kWidth), (__m512i)high);
  }

  template <class F>
  static INLINE IntVec shown(int64_t step, int64_t keys, F&& sees) {
    const IntVec low = sees(2 * step), high = 2 * step + 1 < keys ? sees(2 * step + 1) : IntVec{};
    return (IntVec)((BitVec)low >> 16 | ((BitVec)high & 0xffff0000u));
  }

  static INLINE IntVec terms_of(Vec x) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
    return (IntVec)(((Halves)x & 0x7fff) != 0);
  }

 private:
  // kWidth pairs of a row, from its element on, zeros after the last.
  static INLINE Vec load_pairs(const View& x, const char* from, int64_t dims) {
    if (x.dim == 2 && dims >= 2 * kWidth) return read<Vec>(from);
    alignas(64) uint16_t halves[2 * kWidth] = {};
    for (int64_t d = 0; d < smaller(2 * kWidth, dims); ++d) halves[d] = read<uint16_t>(from + d * x.dim);
    return load(reinterpret_cast<const float*>(halves));
  }

  static INLINE __m512i pairs_from(int first, int apart) {
    typedef int16_t Indices __attribute__((vector_size(kVectorBytes)));
    Indices result;
    for (int i = 0; i < 2 * kWidth; ++i) result[i] = int16_t(first + i / 2 + i % 2 * apart);
    return (__m512i)result;
  }
};
#endif
