// Backward: the probabilities again, from lse, then five products for each pair of a key block and a query block.
//
//   P' = exp2(K Q' - lse)     dS' = P' (V dO' - delta)
//   dv += P' dout             dk += scale dS' q             dQ' += scale K' dS'         (' is transposed)
//
// A key block owns its rows of dk and dv. All of them add to dQ', in the order of the keys whatever the threads.

// Some keys of a head, and their gradients as far as they are summed.
template <class Operands>
struct KeyBlock {
  using Product = typename Operands::Product;

  const BackwardHead& head;
  const AttentionParams& p;
  const Visibility& visible;
  Interval keys;
  bool finite;  // whether all of k and v is
  int64_t dk_row, dv_row;
  Broadcast k, v;                 // [key][step of dims]
  Broadcast k_steps;              // [step of keys][dim]
  GradientTiles<Operands> tiles;  // of the current query block
  Real *dk, *dv;                  // [key][dim] in whole vectors
  OptionScratch of_options;       // only where options are given

  KeyBlock(const BackwardHead& of, int64_t n, Arena& arena)
      : head(of),
        p(of.p),
        visible(of.visible),
        keys(Interval{n * kBlockN, (n + 1) * kBlockN}.intersect({0, of.member.seqlen_k})),
        dk_row(whole_vectors(p.head_dim)),
        dv_row(whole_vectors(p.head_dim_v)),
        tiles(arena.array<Real>(
            size_t(GradientTiles<Operands>::kSize + kBlockN * (3 * dk_row + 2 * dv_row) + OptionScratch::kSize))) {
    const int64_t count = keys.hi - keys.lo, first = of.member.first_k + keys.lo;
    const char *k_rows = p.k.at(of.batch, of.kv_head, first), *v_rows = p.v.at(of.batch, of.kv_head, first);
    finite = all_rows_finite(p.k, k_rows, count, p.head_dim) && all_rows_finite(p.v, v_rows, count, p.head_dim_v);
    dk = tiles.weights + GradientTiles<Operands>::kSize, dv = dk + kBlockN * dk_row;
    Real* const copies = dv + kBlockN * dv_row;
    k = Operands::keys(p.k, k_rows, count, p.head_dim, copies);
    v = Operands::keys(p.v, v_rows, count, p.head_dim_v, copies + kBlockN * dk_row);
    Real* const copy = copies + kBlockN * (dk_row + dv_row);
    k_steps = Operands::kTerms == 1 ? k : Operands::values(p.k, k_rows, count, p.head_dim, copy);
    of_options = OptionScratch(copy + kBlockN * dk_row);
    std::memset(dk, 0, size_t(kBlockN * (dk_row + dv_row)) * sizeof(Real));
  }

  void add_query_block(int64_t m, int64_t n) {
    const Interval rows = head.rows_of(m), seen = seen_by(rows);
    const bool guarded = !(finite && head.scratch.finite[m]), shifted = PairOptions<kTileVectors>::given(p);
    bool any = !shifted;
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes) {
      const Interval lanes = {first, smaller(first + kLanes, rows.hi)};
      if (shifted)
        any |= score_with_options(first, first - rows.lo, lanes);
      else
        score(first, first - rows.lo, lanes);
    }
    if (any && p.dv.data) add_rows(dv, dv_row, tiles.weights_by_key(), head.dout_rows(), rows, seen, guarded);
    if (any && p.dk.data) add_rows(dk, dk_row, tiles.dscores_by_key(), head.q_rows(), rows, seen, guarded);
    if (p.dq.data || p.dbias.data) add_in_turn(rows, m, n, any, guarded);
  }

  void store_gradients(int64_t n, bool adds) const {
    if (p.dk.data) store_rows(p.dk, p.head_dim, dk, dk_row, Real(p.scale), adds);
    if (p.dv.data) store_rows(p.dv, p.head_dim_v, dv, dv_row, Real(1), adds);
    if (p.dslopes) head.scratch.slope_sums[n] = sum(of_options.slope_sum);
  }

 private:
  // Keys that some of the rows see, counted from the first one, and in whole tiles: add_rows reads such tiles.
  Interval seen_by(Interval rows) const {
    const Interval seen = visible.keys_of_any(rows).intersect(keys);
    if (seen.empty()) return {0, 0};
    const int64_t first = (seen.lo - keys.lo) / kTileRows * kTileRows;
    return {first, smaller(blocks_of(kTileRows, seen.hi - keys.lo) * kTileRows, keys.hi - keys.lo)};
  }

  // Lanes past the last row see nothing, or sums over lanes would hold what no row sees.
  LaneMask<kTileVectors> mask_of(Interval rows, int64_t first_key) const {
    IntVec query[kTileVectors];
    for (int i = 0; i < kLanes; ++i) query[i / kWidth][i % kWidth] = i;
    LaneMask<kTileVectors> mask(visible, rows.lo, query, first_key);
    mask.hide_lanes_from(int(rows.hi - rows.lo));
    return mask;
  }

  // weights and dscores for the queries of a lane block.
  void score(int64_t first, int64_t column, Interval rows) {
    const LaneMask<kTileVectors> mask = mask_of(rows, keys.lo);
    const Interval all = visible.keys_of_all(rows), common = {all.lo - keys.lo, all.hi - keys.lo};
    const Interval seen = seen_by(rows);
    const Real *qt = head.qt(first), *dout_t = head.dout_t(first), scale = base2_scale(p);
    Vec lse[kTileVectors], rest[kTileVectors], delta[kTileVectors];
    std::memcpy(lse, head.scratch.lse + first, sizeof(lse));
    std::memcpy(rest, head.scratch.lse_rest + first, sizeof(rest));
    std::memcpy(delta, head.scratch.delta + first, sizeof(delta));
    for_row_tiles(seen.lo, seen.hi, [&](auto height, int64_t j) INLINE_LAMBDA {
      const bool masked = !common.contains({j, j + height});
      const auto hide = [&](Tile<height, kTileVectors>& x) INLINE_LAMBDA {
        x.map([&](Vec x, auto m, auto n) INLINE_LAMBDA { return mask.sees(Int(j + m), n) ? x : Vec{}; });
      };
      Tile<height, kTileVectors> x;
      x.clear();
      x.template multiply_add<Product>(k.rows_from(j), qt, kLanes, head.scratch.q_steps);
      x.map([&](Vec x, auto, auto n)
                INLINE_LAMBDA { return probability<Operands>(Operands::scaled(x, scale), lse[n], rest[n]); });
      if (masked) hide(x);
      tiles.keep_weights(x, j, column);
      x.clear();
      x.template multiply_add<Product>(v.rows_from(j), dout_t, kLanes, head.scratch.dout_steps);
      x.map([&](Vec x, auto m, auto n) INLINE_LAMBDA { return tiles.kept_weight(j, column, m, n) * (x - delta[n]); });
      if (masked) hide(x);
      tiles.keep_dscores(x, j, column);
    });
  }

  // The same with options: both products first, then pair by pair. Whether any pair is visible.
  bool score_with_options(int64_t first, int64_t column, Interval rows) {
    const Interval seen = seen_by(rows);
    Real *const weights = tiles.weights, *const dscores = tiles.dscores;
    PairBlock block{head,
                    LaneRows::of_one_head(head.member, head.head, first, rows.hi - rows.lo),
                    {seen.lo + keys.lo, seen.hi + keys.lo},
                    weights + at(seen.lo, column, 0),
                    dscores + at(seen.lo, column, 0),
                    of_options};
    const bool any = !seen.empty() && block.load_options(mask_of(rows, seen.lo + keys.lo));
    if (any) {
      for_row_tiles(seen.lo, seen.hi, [&](auto height, int64_t j) INLINE_LAMBDA {
        const auto product = [&](Broadcast a, const Real* b, int64_t steps, Real factor, Real* to) INLINE_LAMBDA {
          Tile<height, kTileVectors> x;
          x.clear();
          x.template multiply_add<Product>(a.rows_from(j), b, kLanes, steps);
          x.map([&](Vec x, auto m, auto n)
                    INLINE_LAMBDA { return store(to + at(j + m, column, n), Operands::scaled(x, factor)), x; });
        };
        product(k, head.qt(first), head.scratch.q_steps, base2_scale(p), weights);
        product(v, head.dout_t(first), head.scratch.dout_steps, Real(1), dscores);
      });
      block.finish();
    } else {
      block.clear();
    }
    tiles.keep_all(column, seen);
    return any;
  }

  static INLINE int64_t at(int64_t key, int64_t column, int n) { return key * kBlockM + column + n * kWidth; }

  // sum[key] += a[key, query] * b[query] over the queries that see the key, or of a tile of keys one of them; guarded,
  // where b may be not finite, over those whose a is not 0.
  void add_rows(Real* sum, int64_t sum_row, Broadcast a, Rows b, Interval rows, Interval seen, bool guarded) {
    for_vector_tiles(0, sum_row / kWidth, [&](auto width, int64_t n) INLINE_LAMBDA {
      const auto add = [&](auto height, int64_t j) INLINE_LAMBDA {
        const Interval see =
            visible.rows_of_any({keys.lo + j, keys.lo + j + height}, head.member.seqlen_q).intersect(rows);
        if (see.empty()) return;
        const int64_t first = see.lo / Operands::kTerms, steps = Operands::steps(see.hi) - first;
        const Broadcast of_keys = {a.data + j * a.row + first - rows.lo / Operands::kTerms, a.row, 1};
        const Real* const row = b.data + first * b.row + n * kWidth;
        Tile<height, width> x;
        x.clear();
        if (guarded)
          x.template multiply_add_terms<Product>(of_keys, row, b.row, steps, Operands::terms_of);
        else
          x.template multiply_add<Product>(of_keys, row, b.row, steps);
        x.map([&](Vec x, auto r, auto c) INLINE_LAMBDA {
          Real* to = sum + (j + r) * sum_row + (n + c) * kWidth;
          return store(to, load(to) + x), x;
        });
      };
      for_row_tiles(seen.lo, seen.hi, add);
    });
  }

  // dQ' += K' dS', and what else is summed over keys, when all key blocks before this one have done so.
  void add_in_turn(Interval rows, int64_t m, int64_t n, bool any, bool guarded) {
    std::atomic<int32_t>& turn = head.scratch.turn[m];
    while (turn.load(std::memory_order_acquire) != n) {
      if (head.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
      std::this_thread::yield();
    }
    for (int64_t first = rows.lo; any && p.dq.data && first < rows.hi; first += kLanes)
      add_to_lane_block(first, first - rows.lo, seen_by({first, smaller(first + kLanes, rows.hi)}), guarded);
    if (any && p.dbias.data && p.dbias.dim == 0)
      for (int64_t i = rows.lo; i < rows.hi; ++i) head.scratch.bias_sums[i] += of_options.row_sums[i - rows.lo];
    turn.store(int32_t(n + 1), std::memory_order_release);
  }

  void add_to_lane_block(int64_t first, int64_t column, Interval seen, bool guarded) {
    Real* dq_t = head.scratch.dq_t + first * p.head_dim;
    const int64_t step = seen.lo / Operands::kTerms, steps = Operands::steps(seen.hi) - step;
    const Broadcast k_t = {k_steps.data + step * k_steps.row, k_steps.step, k_steps.row};
    const Real* const from = tiles.dscores_by_query() + at(step, column, 0);
    for_row_tiles(0, p.head_dim, [&](auto height, int64_t d) INLINE_LAMBDA {
      Tile<height, kTileVectors> x;
      x.clear();
      if (guarded)
        x.template multiply_add_where<Product>(
            k_t.rows_from(d), from, kBlockM, steps,
            [&](int64_t j, int n) INLINE_LAMBDA { return Operands::terms_of(load(from + at(j, 0, n))); });
      else
        x.template multiply_add<Product>(k_t.rows_from(d), from, kBlockM, steps);
      x.map([&](Vec x, auto r, auto n) INLINE_LAMBDA {
        Real* to = dq_t + (d + r) * kLanes + n * kWidth;
        return store(to, load(to) + x), x;
      });
    });
  }

  void store_rows(const View& x, int64_t dims, const Real* from, int64_t from_row, Real factor, bool adds) const {
    char* to = x.at(head.batch, head.kv_head, head.member.first_k + keys.lo);
    for (int64_t j = 0; j < keys.hi - keys.lo; ++j)
      for (int64_t d = 0; d < dims; d += kWidth) {
        char* at = to + j * x.seq + d * x.dim;
        const Vec before = adds ? load_elements(x.element, at, x.dim, dims - d) : Vec{};
        store_row(x.element, at, x.dim, dims - d, fused(load(from + j * from_row + d), broadcast(factor), before));
      }
  }
};

template <class Operands>
void add_key_block(const BackwardHead& head, int64_t n) try {
  static thread_local Arena arena;
  KeyBlock<Operands> block(head, n, arena);
  const Interval rows = head.visible.rows_of_any(block.keys, head.member.seqlen_q);
  for (int64_t m = rows.lo / kBlockM; m * kBlockM < rows.hi; ++m) block.add_query_block(m, n);
  block.store_gradients(n, head.head % (head.p.heads / head.p.kv_heads) != 0);
} catch (...) {
  head.failed = true;  // or the blocks after this one would wait for its turn for ever
  throw;
}

double flops_of_backward(const AttentionParams& p) {
  double pairs = 0;
  for (int64_t b = 0; b < (p.cu_seqlens_q ? p.batch : 1); ++b) {
    const Member member = member_of(p, b);
    pairs += double(member.seqlen_q) * double(member.seqlen_k) * double(p.cu_seqlens_q ? 1 : p.batch);
  }
  return 5.0 * double(p.heads) * pairs * double(p.head_dim + p.head_dim_v);
}

// Each thread takes the query heads of a kv head, one after another; or they share the blocks of one head, if few, or
// if all heads add to the same gradient of a bias.
template <class Operands>
void backward_with(const AttentionParams& p, int threads) {
  if (p.batch == 0 || p.heads == 0) return;
  if (is_small(flops_of_backward(p))) threads = 1;
  const int64_t group = p.heads / p.kv_heads, tasks = p.batch * p.kv_heads;
  const bool shares_bias = p.dbias.data && (p.dbias.batch == 0 || p.dbias.head == 0);
  const int inside = tasks < threads || shares_bias ? threads : 1;
  parallel_for(tasks, inside > 1 ? 1 : threads, [&](int64_t task) {
    static thread_local Arena arena;
    const Member member = member_of(p, task / p.kv_heads);
    for (int64_t of_group = 0; of_group < group; ++of_group) {
      const BackwardHead head(p, member, task % p.kv_heads * group + of_group, Operands::kTerms, arena);
      const int64_t query_blocks = blocks_of(kBlockM, member.seqlen_q);
      parallel_for(query_blocks, inside, [&](int64_t m) { head.prepare<Operands>(m); });
      parallel_for(blocks_of(kBlockN, member.seqlen_k), inside, [&](int64_t n) { add_key_block<Operands>(head, n); });
      if (p.dq.data) parallel_for(query_blocks, inside, [&](int64_t m) { head.store_dq(m); });
      head.store_option_gradients();
    }
    arena.trim();
  });
}

void backward(const AttentionParams& p, int threads) {
#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
  if (p.q.element == Element::kBFloat16) return backward_with<PairOperands>(p, threads);
#endif
  backward_with<RealOperands>(p, threads);
}
