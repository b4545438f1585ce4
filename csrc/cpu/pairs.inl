// What options do to the scores of a tile of pairs, [key][lane], in base 2:
//
//   score = cap tanh(raw / cap) + shift        shift = bias - slope |i + offset - j|, or -inf for a hidden pair

constexpr double kLog2EOf64 = 1.4426950408889634;
constexpr Real kLog2E = Real(kLog2EOf64);
constexpr Real kInfinity = Real(__builtin_inf());

// The nearest finite number: 0 times an infinite factor would be NaN.
inline Real finite(double x) {
  constexpr double kLargest = sizeof(Real) == 4 ? double(__FLT_MAX__) : __DBL_MAX__;
  return Real(x > kLargest ? kLargest : x < -kLargest ? -kLargest : x);
}
inline Real base2_scale(const AttentionParams& p) { return finite(p.scale * kLog2EOf64); }

template <int N>
struct PairOptions {
  const AttentionParams& p;
  const LaneRows& rows;
  const Visibility& visible;
  Vec slope[N];
  Vec cap, inverse_cap;  // of base 2; 2 / softcap

  static bool given(const AttentionParams& p) { return p.mask.data || p.dropout_seed || change_scores(p); }
  static bool change_scores(const AttentionParams& p) { return p.bias.data || p.slopes || p.softcap != 0.0; }

  INLINE PairOptions(const AttentionParams& params, const LaneRows& of, const Visibility& sees)
      : p(params),
        rows(of),
        visible(sees),
        slope{},
        cap(broadcast(finite(p.softcap * kLog2EOf64))),
        inverse_cap(broadcast(finite(p.softcap != 0.0 ? 2.0 / p.softcap : 0.0))) {
    if (!p.slopes) return;
    const Real* slopes = static_cast<const Real*>(p.slopes) + rows.batch * p.slopes_batch;
    for (int lane = 0; lane < rows.count; ++lane)
      slope[lane / kWidth][lane % kWidth] = slopes[rows.head_of(lane)] * kLog2E;
  }

  // |i + offset - j| for key j counted from the first one.
  INLINE void positions(Interval keys, Vec (&position)[N]) const {
    for (int lane = 0; lane < N * kWidth; ++lane)
      position[lane / kWidth][lane % kWidth] = Real(rows.query_of(lane) + visible.offset - keys.lo);
  }
  static INLINE Vec distance(Vec position, int64_t key) {
    const Vec x = position - Real(key);
    return x < Real(0) ? -x : x;
  }

  // shift for some keys, unless no pair is visible.
  INLINE Shown load_shift(Interval keys, LaneMask<N> mask, Real* shift) const {
    MaskBits<N> bits;
    const Shown by_mask = p.mask.data ? bits.load(p.mask, rows, keys) : Shown::kAll;
    if (by_mask == Shown::kNone) return by_mask;
    if (by_mask == Shown::kSome) mask.shown = bits.words;
    Vec position[N];
    if (p.slopes) positions(keys, position);
    const Vec hidden = broadcast(-kInfinity);
    const bool open = mask.sees_all(Int(keys.hi - keys.lo));
    IntVec any{}, all = ~IntVec{};
    for_biases(keys, [&](int64_t j, int n, Vec x) INLINE_LAMBDA {
      if (p.slopes) x = fused(-slope[n], distance(position[n], j), x);
      if (!open) x = mask.sees(Int(j), n) ? x : hidden;
      any |= x != hidden;
      all &= x != hidden;
      store(shift + (j * N + n) * kWidth, x);
    });
    bool found = false, complete = true;
    for (int i = 0; i < kWidth; ++i) found |= any[i] != 0, complete &= all[i] != 0;
    return complete ? Shown::kAll : found ? Shown::kSome : Shown::kNone;
  }

  // steepness: the cap's derivative.
  INLINE Vec score(Vec raw, Vec shift, Vec* steepness = nullptr) const {
    if (p.softcap != 0.0) {
      const Vec bent = tanh_of(raw * inverse_cap);
      if (steepness) *steepness = Real(1) - bent * bent;
      raw = cap * bent;
    }
    return shifted(raw, shift);
  }
  static INLINE Vec shifted(Vec raw, Vec shift) { return shift == -kInfinity ? broadcast(-kInfinity) : raw + shift; }

  // raw scores -> scores, in place, and the largest of each lane.
  INLINE void apply(Real* scores, const Real* shift, int64_t keys, Vec (&tile_max)[N]) const {
    repeat<N>(EACH(n) { tile_max[n] = broadcast(-kInfinity); });
    for (int64_t j = 0; j < keys; ++j)
      repeat<N>(EACH(n) {
        const int64_t at = (j * N + n) * kWidth;
        const Vec x = score(load(scores + at), load(shift + at));
        tile_max[n] = larger(tile_max[n], x);
        store(scores + at, x);
      });
  }

 private:
  // f(key from the first one, vector, bias in base 2) for all pairs.
  template <class F>
  INLINE void for_biases(Interval keys, F&& f) const {
    const View& x = p.bias;
    const int64_t count = keys.hi - keys.lo;
    const char* from[N * kWidth];
    bool same_rows = true;
    for (int lane = 0; x.data && lane < N * kWidth; ++lane) {
      from[lane] = rows.row(x, lane < rows.count ? lane : 0) + keys.lo * x.dim;
      same_rows &= from[lane] == from[0];
    }
    const bool by_key = x.data && x.dim != 0;
    if (by_key && !same_rows) return for_squares(from, count, f);
    Vec biases[N] = {};
    for (int lane = 0; x.data && !by_key && lane < N * kWidth; ++lane)
      biases[lane / kWidth][lane % kWidth] = read_element(x.element, from[lane]);
    for (Vec& of_rows : biases) of_rows = bounded(of_rows);
    for (int64_t j = 0; j < count; ++j) {
      for (int n = 0; by_key && n < N; ++n)
        biases[n] = bounded(broadcast(read_element(x.element, from[0] + j * x.dim)));
      repeat<N>(EACH(n) { f(j, n, biases[n]); });
    }
  }

  // kWidth keys of kWidth queries at a time.
  template <class F>
  INLINE void for_squares(const char* (&from)[N * kWidth], int64_t count, F&& f) const {
    const View& x = p.bias;
    for (int n = 0; n < N; ++n)
      for (int64_t first = 0; first < count; first += kWidth) {
        Vec square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          const char* const at = from[n * kWidth + i] + first * x.dim;
          prefetch(at + kBlockN * x.dim, 1, 0, 1);  // of the tile that comes next
          square[i] = load_elements(x.element, at, x.dim, count - first);
        }
        transpose(square);
        for (int i = 0; i < kWidth && first + i < count; ++i) f(first + i, n, bounded(square[i]));
      }
  }

  // In base 2. A finite bias near the largest float stays finite; what is its own half, 0 or infinite, is left as it
  // is.
  static INLINE Vec bounded(Vec x) {
    if constexpr (sizeof(Real) == sizeof(double)) return x * kLog2E;
    const Vec largest = broadcast(Real(3e38 / kLog2EOf64));
    const Vec opposite = no_more_than(largest, -no_more_than(largest, x));
    return x == x * Real(0.5) ? x : opposite * -kLog2E;
  }
};
