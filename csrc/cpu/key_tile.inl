// A tile of keys in forward, and what the rows of a block see of it.

// Keys [range.lo, range.hi) and what the rows of a block see of them.
template <int N>
struct KeyTile {
  const char *k, *v;  // rows of the first key
  Interval range;
  int64_t keys;
  Interval common;  // keys that all rows see; it and the mask count from the first key
  LaneMask<N> mask;

  INLINE KeyTile(const AttentionParams& p, const char* k_rows, const char* v_rows, const Visibility& visible,
                 Interval queries, const IntVec (&query)[N], Interval of)
      : k(k_rows + of.lo * p.k.seq),
        v(v_rows + of.lo * p.v.seq),
        range(of),
        keys(of.hi - of.lo),
        mask(visible, queries.lo, query, of.lo) {
    common = visible.keys_of_all(queries).intersect(range);
    if (common.empty()) common = {range.lo, range.lo};
    common = {common.lo - range.lo, common.hi - range.lo};
  }

  INLINE bool is_common() const { return common.lo == 0 && common.hi == keys; }

  // No key is certain to be seen by all rows then.
  INLINE void hide_by(const MaskBits<N>& bits) {
    mask.shown = bits.words;
    common = {0, 0};
  }

  // Whether a value that some row does not see is infinite or NaN: its weight is 0, and 0 times it would be NaN.
  INLINE bool hides_infinite(const AttentionParams& p, Shown by_options) const {
    return hides_infinite(p, by_options, [&](int64_t j) INLINE_LAMBDA { return v + j * p.v.seq; });
  }

  // The same where row(j) is a key's row of v.
  template <class Row>
  INLINE bool hides_infinite(const AttentionParams& p, Shown by_options, Row&& row) const {
    const auto finite = [&](int64_t from, int64_t to) INLINE_LAMBDA {
      return all_rows_finite(p.v, to - from, p.head_dim_v, [&](int64_t j) INLINE_LAMBDA { return row(from + j); });
    };
    if (by_options == Shown::kSome) return !finite(0, keys);
    return !(finite(0, common.lo) && finite(common.hi, keys));
  }
};
