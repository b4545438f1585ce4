// What the products of forward and backward are made of: Reals here, pairs of bfloat16 in pair_operands.inl.
//
//   S' = keys queries        O' = values' weights

struct RealOperands {
  using Product = Fma;

  static constexpr int kTerms = 1;  // that a step of a product adds up

  static constexpr int64_t steps(int64_t count) { return count; }

  // Rows as [step of dims][lane], scaled.
  template <int N, class Row>
  static INLINE void load_lanes(Real* to, int64_t dims, const View& x, Real scale, Row&& row) {
    load_transposed<N>(to, dims, x, scale, row);
  }
  static INLINE Vec scaled(Vec score, Real) { return score; }
  static INLINE Vec power_of_2(Vec x) { return exp2(x); }  // as precise as a weight has to be

  static INLINE Broadcast keys(const View& x, const char* from, int64_t rows, int64_t dims, Real* copy) {
    return real_rows(x, from, rows, dims, copy);
  }
  static INLINE Broadcast values(const View& x, const char* from, int64_t rows, int64_t dims, Real* copy) {
    return real_rows(x, from, rows, dims, copy);
  }
  // [step of rows][dim], dims in whole vectors.
  static INLINE void copy_steps(Real* to, const View& x, const char* from, int64_t rows, int64_t dims) {
    copy_rows(to, x, from, rows, dims);
  }
  template <int N>
  static INLINE void prepare_weights(Real*, int64_t) {}

  // The bits of a step of values that the lanes see, where sees(key) is what they see of a key.
  template <class F>
  static INLINE IntVec shown(int64_t step, int64_t, F&& sees) {
    return sees(step);
  }

  // The bits of a step's terms that are not 0.
  static INLINE IntVec terms_of(Vec x) { return x != Real(0); }
};
