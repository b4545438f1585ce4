// P' and dS' of a key block and a query block, and how the products with them take them.
//
//   dv += P' dout        dk += dS' q        dQ' += K' dS'

template <class Operands>
struct GradientTiles {
  static constexpr int64_t kSize = 2 * kBlockN * kBlockM;

  Real *weights, *dscores;  // [key][query]

  GradientTiles(Real* at) : weights(at), dscores(at + kBlockN * kBlockM) {}

  // [key][step of queries]
  INLINE Broadcast weights_by_key() const { return {weights, kBlockM, 1}; }
  INLINE Broadcast dscores_by_key() const { return {dscores, kBlockM, 1}; }

  // [step of keys][query], kBlockM apart
  INLINE const Real* dscores_by_query() const { return dscores; }

  // Stores a tile for the products; `column` is where its lane block begins.
  template <int M>
  INLINE void keep_weights(const Tile<M, kTileVectors>& x, int64_t key, int64_t column) const {
    keep(x, weights + key * kBlockM + column);
  }
  template <int M>
  INLINE void keep_dscores(const Tile<M, kTileVectors>& x, int64_t key, int64_t column) const {
    keep(x, dscores + key * kBlockM + column);
  }

  // Of the tile whose weights were kept last.
  INLINE Vec kept_weight(int64_t key, int64_t column, int m, int n) const {
    return load(weights + (key + m) * kBlockM + column + n * kWidth);
  }

  // Does so with all weights and dscores of a lane block, written there by someone else.
  INLINE void keep_all(int64_t, Interval) const {}

 private:
  template <int M>
  static INLINE void keep(const Tile<M, kTileVectors>& x, Real* to) {
    repeat<M>(EACH(m) { repeat<kTileVectors>(EACH(n) { store(to + m * kBlockM + n * kWidth, x.at[m][n]); }); });
  }
};

#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
template <>
struct GradientTiles<PairOperands> {
  static constexpr int64_t kPairs = kBlockN * kBlockM / 2, kSize = 7 * kPairs + kTileRows * kLanes;

  float *weights, *dscores;  // as above
  float *weight_pairs, *dscore_pairs, *dscores_of_key_pairs;
  float* kept;  // [key][query] of a tile: the weights before they were rounded

  GradientTiles(float* at) : weights(at), dscores(at + 2 * kPairs), weight_pairs(at + 4 * kPairs) {
    dscore_pairs = weight_pairs + kPairs, dscores_of_key_pairs = dscore_pairs + kPairs;
    kept = dscores_of_key_pairs + kPairs;
  }

  INLINE Broadcast weights_by_key() const { return {weight_pairs, kBlockM / 2, 1}; }
  INLINE Broadcast dscores_by_key() const { return {dscore_pairs, kBlockM / 2, 1}; }
  INLINE const float* dscores_by_query() const { return dscores_of_key_pairs; }

  // Tiles begin at even keys; an odd last key is paired with zeros.
  template <int M>
  INLINE void keep_weights(const Tile<M, 2>& x, int64_t key, int64_t column) const {
    const int64_t at = key * kBlockM + column;
    repeat<M>(EACH(m) {
      repeat<2>(EACH(n) { store(kept + m * kLanes + n * kWidth, x.at[m][n]); });
      store(weight_pairs + at / 2 + m * kBlockM / 2, PairOperands::round_halves(x.at[m][0], x.at[m][1]));
    });
  }
  INLINE Vec kept_weight(int64_t, int64_t, int m, int n) const { return load(kept + m * kLanes + n * kWidth); }

  template <int M>
  INLINE void keep_dscores(const Tile<M, 2>& x, int64_t key, int64_t column) const {
    Vec rows[M + M % 2] = {};
    repeat<M>(EACH(m) {
      rows[m] = PairOperands::round_halves(x.at[m][0], x.at[m][1]);
      store(dscore_pairs + ((key + m) * kBlockM + column) / 2, rows[m]);
    });
    repeat<(M + 1) / 2>(EACH(m) {
      float* const to = dscores_of_key_pairs + (key / 2 + m) * kBlockM + column;
      store(to, PairOperands::interleave_lower(rows[2 * m], rows[2 * m + 1]));
      store(to + kWidth, PairOperands::interleave_upper(rows[2 * m], rows[2 * m + 1]));
    });
  }

  INLINE void keep_all(int64_t column, Interval keys) const {
    for_row_tiles(keys.lo, keys.hi, [&](auto height, int64_t j) INLINE_LAMBDA {
      const auto load_from = [&](const float* from) INLINE_LAMBDA {
        Tile<height, 2> x;
        x.map([&](Vec, auto m, auto n) INLINE_LAMBDA { return load(from + (j + m) * kBlockM + column + n * kWidth); });
        return x;
      };
      keep_weights(load_from(weights), j, column);
      keep_dscores(load_from(dscores), j, column);
    });
  }
};
#endif
