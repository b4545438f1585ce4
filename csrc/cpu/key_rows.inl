// Rows of k and v as decoding reads them: in whole vectors, one after the other in their tensors or in pages.

constexpr int64_t kRowsAhead = 32;  // past the tile: rows of k that decoding fetches into the cache before their turn

// Row j of a tile is the one after row j - 1.
struct DenseRows {
  const char *first_k, *first_v;
  int64_t k_row, v_row;

  INLINE void find(const QueryBlock& block, Interval range) {
    k_row = block.p.k.seq, v_row = block.p.v.seq;
    first_k = block.k + range.lo * k_row, first_v = block.v + range.lo * v_row;
  }

  INLINE const char* k(int64_t j) const { return first_k + j * k_row; }
  INLINE const char* v(int64_t j) const { return first_v + j * v_row; }
};

// Row j is where the page table says. Its values are untrusted: they are cut to the pages there are.
struct PagedRows {
  const char *of_k[kBlockN + kRowsAhead], *of_v[kBlockN];

  INLINE void find(const QueryBlock& block, Interval range) {
    const AttentionParams& p = block.p;
    const int32_t* const table = p.page_table + block.rows.batch * p.page_table_batch;
    const int64_t head = block.rows.head / (p.heads / p.kv_heads);
    const int64_t keys = range.hi - range.lo, known = smaller(range.hi + kRowsAhead, p.seqlen_k) - range.lo;
    for (int64_t j = 0; j < known;) {
      const int64_t key = range.lo + j, first = key % p.page_size;
      const int64_t page = clamp(table[key / p.page_size], 0, p.pages - 1);
      const char *k_at = p.k.at(page, head, first), *v_at = p.v.at(page, head, first);
      for (const int64_t end = smaller(known, j + p.page_size - first); j < end; ++j) {
        of_k[j] = k_at, k_at += p.k.seq;
        if (j < keys) of_v[j] = v_at, v_at += p.v.seq;
      }
    }
    for (int64_t j = known; j < keys + kRowsAhead; ++j) of_k[j] = of_k[known - 1];
  }

  INLINE const char* k(int64_t j) const { return of_k[j]; }
  INLINE const char* v(int64_t j) const { return of_v[j]; }
};

// How whole vectors of a row of k or v are read, as Reals.
template <Element kElement>
struct RowsOf {
  static constexpr bool kPairs = false;
  static constexpr int kDims = kWidth;  // in a vector of a dot product
  static constexpr int64_t kBytes = kElement == Element::kFloat64 ? 8 : kElement == Element::kFloat32 ? 4 : 2;

  static INLINE Vec load_reals(const char* row, int64_t d) {
    const char* const at = row + d * kBytes;
    if constexpr (kElement == kReal) return load(reinterpret_cast<const Real*>(at));
#if !defined(REAL_IS_DOUBLE)
    return widen(kElement, read<HalfVec>(at));
#endif
  }
  static INLINE Vec load_factors(const char* row, int64_t d) { return load_reals(row, d); }
  static INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fused(a, b, c); }
};

#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
// The same, with dot products of pairs.
struct RowsOfPairs : RowsOf<Element::kBFloat16> {
  static constexpr bool kPairs = true;
  static constexpr int kDims = 2 * kWidth;

  static INLINE Vec load_factors(const char* row, int64_t d) { return read<Vec>(row + d * kBytes); }
  static INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return PairDot::multiply_add(a, b, c); }
};
#endif
