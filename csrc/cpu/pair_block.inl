// Backward with options, pair by pair, between the products with k and v and those with their results.
//
//   P' = exp2(score - lse)                dP' = dropout (V dO')         dS' = P' (dP' - delta)
//   dbias = dS     dslope = -sum(dS |i + offset - j|)     weights = dropout P'     dscores = steepness dS'

// Tiles [key][lane], and sums that a key block gathers.
struct OptionScratch {
  static constexpr int64_t kTile = kBlockN * kLanes, kSize = 2 * kTile + kBlockM;

  Real *shift, *spare;
  Real* row_sums;  // of dbias, over the block's keys, for each query of the query block
  Vec slope_sum{};

  OptionScratch() = default;
  explicit OptionScratch(Real* at) : shift(at), spare(at + kTile), row_sums(at + 2 * kTile) {}
};

// A lane block of queries and some keys of a key block.
struct PairBlock {
  static constexpr int N = kTileVectors;

  const BackwardHead& head;
  const LaneRows rows;
  Interval keys;
  Real *weights, *dscores;  // [key][query], kBlockM apart: first K Q' and V dO', then what the names say
  OptionScratch& scratch;

  bool load_options(const LaneMask<N>& mask) const {
    return options().load_shift(keys, mask, scratch.shift) != Shown::kNone;
  }

  void clear() const {
    for_pairs([&](int64_t, int64_t at, auto) { store(weights + at, Vec{}), store(dscores + at, Vec{}); });
    if (head.p.dbias.data) std::fill_n(row_sums(), kLanes, Real(0));
  }

  void finish() const {
    const AttentionParams& p = head.p;
    const PairOptions<N> given = options();
    if (p.dropout_seed) load_dropout();
    Vec lse[N], rest[N], delta[N];
    std::memcpy(lse, head.scratch.lse + rows.first, sizeof(lse));
    std::memcpy(rest, head.scratch.lse_rest + rows.first, sizeof(rest));
    std::memcpy(delta, head.scratch.delta + rows.first, sizeof(delta));
    for_pairs([&](int64_t j, int64_t at, auto n) INLINE_LAMBDA {
      const int64_t in_tile = (j * N + n) * kWidth;
      const Vec shift = load(scratch.shift + in_tile);
      const Vec kept = p.dropout_seed ? load(scratch.spare + in_tile) : broadcast(Real(1));
      Vec steepness = broadcast(Real(1));
      const Vec x = given.score(load(weights + at), shift, &steepness);
      const auto hidden = shift == -kInfinity;
      const Vec weight = hidden ? Vec{} : probability<RealOperands>(x, lse[n], rest[n]);
      const Vec ds = hidden ? Vec{} : weight * (load(dscores + at) * kept - delta[n]);
      store(weights + at, weight * kept);
      store(dscores + at, hidden ? Vec{} : ds * steepness);  // of a hidden NaN the steepness is NaN
      store(scratch.spare + in_tile, ds);
    });
    if (p.dslopes) add_to_slope_sum();
    if (p.dbias.data) add_to_dbias();
  }

 private:
  PairOptions<N> options() const { return PairOptions<N>(head.p, rows, head.visible); }
  Real* row_sums() const { return scratch.row_sums + rows.first % kBlockM; }

  // f(key from the first one, place in weights and dscores, vector)
  template <class F>
  INLINE void for_pairs(F&& f) const {
    for (int64_t j = 0; j < keys.hi - keys.lo; ++j) repeat<N>(EACH(n) { f(j, j * kBlockM + n * kWidth, n); });
  }

  // spare = what dropout multiplies each pair with
  void load_dropout() const {
    for_kept<N>(head.p, rows, keys, [&](int64_t j, int n, IntVec kept) INLINE_LAMBDA {
      store(scratch.spare + (j * N + n) * kWidth, kept ? broadcast(Real(head.p.dropout_scale)) : Vec{});
    });
  }

  // spare holds dS', here and below.
  void add_to_slope_sum() const {
    Vec position[N], total = scratch.slope_sum;
    options().positions(keys, position);
    for (int64_t j = 0; j < keys.hi - keys.lo; ++j)
      repeat<N>(
          EACH(n) { total -= load(scratch.spare + (j * N + n) * kWidth) * PairOptions<N>::distance(position[n], j); });
    scratch.slope_sum = total;
  }

  // What is the same for all keys waits for its turn in row_sums, for other key blocks add to it too.
  void add_to_dbias() const {
    const View& x = head.p.dbias;
    const int64_t count = keys.hi - keys.lo;
    if (x.dim == 0) {
      Vec total[N] = {};
      for (int64_t j = 0; j < count; ++j)
        repeat<N>(EACH(n) { total[n] += load(scratch.spare + (j * N + n) * kWidth); });
      std::memcpy(row_sums(), total, sizeof(total));
    } else if (x.seq == 0) {
      Real* const to = reinterpret_cast<Real*>(x.at(rows.batch, rows.head, 0)) + keys.lo;
      for (int64_t j = 0; j < count; ++j) {
        Vec total{};
        repeat<N>(EACH(n) { total += load(scratch.spare + (j * N + n) * kWidth); });
        to[j] += sum(total);
      }
    } else {
      for (int64_t j = 0; j < count; j += kWidth)
        for (int n = 0; n < N; ++n) add_square(j, smaller(kWidth, count - j), n);
    }
  }

  // kWidth keys of kWidth queries.
  void add_square(int64_t first, int64_t count, int n) const {
    Vec square[kWidth];
    for (int i = 0; i < kWidth; ++i)
      square[i] = i < count ? load(scratch.spare + ((first + i) * N + n) * kWidth) : Vec{};
    transpose(square);
    for (int i = 0; i < kWidth; ++i)
      if (char* const row = rows.row(head.p.dbias, n * kWidth + i)) {
        Real* const to = reinterpret_cast<Real*>(row) + keys.lo + first;
        store_some(to, 1, count, load_some(to, 1, count) + square[i]);
      }
  }
};
