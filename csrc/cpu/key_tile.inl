// A tile of keys in forward, and what the rows of a block see of it.

constexpr int kBlockN = 128;

// Keys [range.lo, range.hi) and what the rows of a block see of them.
template <int N>
struct KeyTile {
  const char *k, *v;  // rows of the first key
  Interval range;
  int64_t keys;
  Interval common;  // keys that all rows see; it and the mask count from the first key
  LaneMask<N> mask;
  bool guarded;  // a value that some row does not see is not finite: 0 * inf would be nan

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
    guarded = !(all_rows_finite(p.v, v, common.lo, p.head_dim_v) &&
                all_rows_finite(p.v, v + common.hi * p.v.seq, keys - common.hi, p.head_dim_v));
  }

  INLINE bool is_common() const { return common.lo == 0 && common.hi == keys; }

  // A mask or a bias hides some pairs too.
  INLINE void guard(const AttentionParams& p) {
    if (!guarded && (p.mask.data || p.bias.data)) guarded = !all_rows_finite(p.v, v, keys, p.head_dim_v);
  }
};
