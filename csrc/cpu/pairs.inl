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
    if (p.bias.data) load_bias(keys, shift);
    Vec position[N];
    if (p.slopes) positions(keys, position);
    const Vec hidden = broadcast(-kInfinity), largest = broadcast(Real(3e38 / kLog2EOf64));
    IntVec any{}, all = ~IntVec{};
    for (int64_t j = 0; j < keys.hi - keys.lo; ++j)
      repeat<N>(EACH(n) {
        const int64_t at = (j * N + n) * kWidth;
        Vec x{};
        if (p.bias.data) {
          x = load(shift + at);
          if constexpr (sizeof(Real) == 4) {  // a finite bias near the largest float stays finite
            x = x > largest && x < -hidden ? largest : x;
            x = x < -largest && x > hidden ? -largest : x;
          }
          x = x * kLog2E;
        }
        if (p.slopes) x = fused(-slope[n], distance(position[n], j), x);
        x = mask.sees(Int(j), n) ? x : hidden;
        any |= x != hidden;
        all &= x != hidden;
        store(shift + at, x);
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
    return shift == -kInfinity ? broadcast(-kInfinity) : raw + shift;
  }

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
  // to[key][lane] = bias[lane's row, key]
  void load_bias(Interval keys, Real* to) const {
    const View& x = p.bias;
    const int64_t count = keys.hi - keys.lo;
    const char* from[N * kWidth];
    for (int lane = 0; lane < N * kWidth; ++lane) {
      const char* const at = rows.row(x, lane);
      from[lane] = at ? at + keys.lo * x.dim : nullptr;
    }
    const auto row = [&](int lane) INLINE_LAMBDA { return from[lane]; };
    bool one_row = true;
    for (int lane = 1; lane < rows.count; ++lane) one_row &= row(lane) == row(0);
    if (x.dim != 0 && !one_row) return load_transposed<N>(to, count, x, Real(1), row);
    Vec column[N] = {};
    if (x.dim == 0)
      for (int lane = 0; lane < rows.count; ++lane)
        column[lane / kWidth][lane % kWidth] = read_element(x.element, row(lane));
    for (int64_t j = 0; j < count; ++j)
      repeat<N>(EACH(n) {
        store(to + (j * N + n) * kWidth,
              x.dim == 0 ? column[n] : broadcast(read_element(x.element, row(0) + j * x.dim)));
      });
  }
};
