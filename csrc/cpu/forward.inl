// Forward: online softmax over tiles of keys, with one lane a query, so that k and v are read as they are.
//
//   S' = K Q'        p = exp2(S' - row_max)        O' = rescale O' + V' p        (' is transposed)
//
// Q' contains scale log2(e). Source: Dao, "FlashAttention-2", 2023, Algorithm 1.
// A tile starts at a multiple of kBlockN whatever is visible, and a key that a row does not see changes none of its
// bits; so those depend on the row alone, not on its neighbours, lane or batch.

struct ForwardScratch {
  Real *qt, *out_t, *scores, *shift, *copy;

  ForwardScratch(const AttentionParams& p, Arena& arena) {
    const int64_t tile = kBlockN * kLanes, widest = whole_vectors(std::max(p.head_dim, p.head_dim_v));
    qt = arena.array<Real>(size_t((p.head_dim + p.head_dim_v) * kLanes + 2 * tile + kBlockN * widest));
    out_t = qt + p.head_dim * kLanes, scores = out_t + p.head_dim_v * kLanes;
    shift = scores + tile, copy = shift + tile;
  }
};

// scores = K Q', or what options that have loaded their shift make of it, and the largest score of each row.
template <class Operands, int N>
INLINE void score_tile(const QueryBlock& block, const KeyTile<N>& tile, const ForwardScratch& scratch,
                       const PairOptions<N>* options, Vec (&tile_max)[N]) {
  const AttentionParams& p = block.p;
  const Broadcast k = Operands::keys(p.k, tile.k, tile.keys, p.head_dim, scratch.copy);
  const int64_t steps = Operands::steps(p.head_dim);
  const Real scale = base2_scale(p);
  repeat<N>(EACH(n) { tile_max[n] = broadcast(-kInfinity); });
  for_row_tiles(0, tile.keys, [&](auto height, int64_t j) INLINE_LAMBDA {
    if (block.opens_head) {
      prefetch(tile.v + j * p.v.seq, height, p.v.seq, p.head_dim_v * bytes_of(p.v.element));
      prefetch(tile.k + (kBlockN + j) * p.k.seq, height, p.k.seq, p.head_dim * bytes_of(p.k.element));
    }
    Tile<height, N> s;
    s.clear();
    s.template multiply_add<typename Operands::Product>(k.rows_from(j), scratch.qt, N * kWidth, steps);
    s.map([&](Vec x, auto, auto) INLINE_LAMBDA { return Operands::scaled(x, scale); });
    if (options && p.softcap == 0.0)
      s.map([&](Vec x, auto m, auto n)
                INLINE_LAMBDA { return PairOptions<N>::shifted(x, load(scratch.shift + ((j + m) * N + n) * kWidth)); });
    else if (!tile.common.contains({j, j + height}))
      s.map([&](Vec x, auto m, auto n)
                INLINE_LAMBDA { return tile.mask.sees(Int(j + m), n) ? x : broadcast(-kInfinity); });
    s.map([&](Vec x, auto m, auto n) INLINE_LAMBDA {
      tile_max[n] = larger(tile_max[n], x);
      store(scratch.scores + ((j + m) * N + n) * kWidth, x);
      return x;
    });
  });
  if (options && p.softcap != 0.0) options->apply(scratch.scores, scratch.shift, tile.keys, tile_max);
}

template <int M, int N>
INLINE bool all_finite(const Tile<M, N>& x) {
  BitVec check{};
  repeat<M>(EACH(m) { repeat<N>(EACH(n) { check |= (BitVec)(x.at[m][n] - x.at[m][n]); }); });
  return all_zero((Vec)check);
}

// out' = rescale out' + V' weights
template <class Operands, int N>
INLINE void add_values(const AttentionParams& p, const KeyTile<N>& tile, bool shifted, bool hides,
                       const Vec (&rescale)[N], const ForwardScratch& scratch) {
  using Product = typename Operands::Product;
  Real* const weights = scratch.scores;
  const int64_t steps = Operands::steps(tile.keys);
  Operands::template prepare_weights<N>(weights, tile.keys);
  const Broadcast v = Operands::values(p.v, tile.v, tile.keys, p.head_dim_v, scratch.copy);
  const auto shown = [&](int64_t step, int n) INLINE_LAMBDA {
    return Operands::shown(step, tile.keys, [&](int64_t j) INLINE_LAMBDA {
      const IntVec by_options = load(scratch.shift + (j * N + n) * kWidth) != -kInfinity;
      return shifted ? by_options : tile.mask.sees(Int(j), n);
    });
  };
  for_row_tiles(0, p.head_dim_v, [&](auto height, int64_t d) INLINE_LAMBDA {
    const Broadcast v_t{v.data + d * v.step, v.step, v.row};
    Tile<height, N> o;
    o.clear();
    o.template multiply_add<Product>(v_t, weights, N * kWidth, steps);
    if (hides && !all_finite(o)) {  // a hidden value may be infinite or nan, and 0 times it is nan
      o.clear();
      o.template multiply_add_where<Product>(v_t, weights, N * kWidth, steps, shown);
    }
    o.map([&](Vec x, auto m, auto n) INLINE_LAMBDA {
      Real* at = scratch.out_t + ((d + m) * N + n) * kWidth;
      store(at, fused(load(at), rescale[n], x));
      return x;
    });
  });
}

template <class Operands, int N>
void attend(const QueryBlock& block, const ForwardScratch& scratch) {
  const AttentionParams& p = block.p;
  const Interval keys = block.visible.keys_of_any(block.queries);
  IntVec query[N];
  for (int lane = 0; lane < N * kWidth; ++lane) query[lane / kWidth][lane % kWidth] = block.rows.query[lane];
  const bool shifted = PairOptions<N>::change_scores(p);
  const PairOptions<N> options(p, block.rows, block.visible);
  MaskBits<N> bits;

  Operands::template load_lanes<N>(scratch.qt, p.head_dim, p.q, base2_scale(p),
                                   [&](int lane) { return block.rows.row(p.q, lane); });
  std::memset(scratch.out_t, 0, size_t(p.head_dim_v) * N * kWidth * sizeof(Real));
  block.prefetch_rows();
  OnlineSoftmax<N> softmax;
  p.sinks ? softmax.start_with(static_cast<const Real*>(p.sinks), block.rows) : softmax.start();
  for (int64_t start_n = keys.lo / kBlockN * kBlockN; start_n < keys.hi; start_n += kBlockN) {
    const Interval range = keys.intersect({start_n, start_n + kBlockN});
    KeyTile<N> tile(p, block.k, block.v, block.visible, block.queries, query, range);
    Shown shown = Shown::kAll;
    if (shifted)
      shown = options.load_shift(range, tile.mask, scratch.shift);
    else if (p.mask.data)
      shown = bits.load(p.mask, block.rows, range);
    if (shown == Shown::kNone) continue;
    if (shown == Shown::kSome && !shifted) tile.hide_by(bits);
    const bool hides = shown == Shown::kSome || !tile.is_common();
    Vec tile_max[N];
    score_tile<Operands>(block, tile, scratch, shifted ? &options : nullptr, tile_max);
    softmax.template update<Operands::power_of_2>(scratch.scores, tile.keys, tile_max);
    if (p.dropout_seed)
      for_kept<N>(p, block.rows, range, [&](int64_t j, int n, IntVec kept) INLINE_LAMBDA {
        Real* const at = scratch.scores + (j * N + n) * kWidth;
        store(at, kept ? load(at) : Vec{});
      });
    add_values<Operands>(p, tile, shifted, hides, softmax.rescale, scratch);
  }
  Vec factor[N], lse[N];
  softmax.finish(factor, lse);
  if (p.dropout_seed)
    for (Vec& x : factor) x *= Real(p.dropout_scale);
  store_transposed<N>(scratch.out_t, p.head_dim_v, p.out, factor,
                      [&](int lane) { return block.rows.row(p.out, lane); });
  block.store_lse(reinterpret_cast<const Real*>(lse));
}

// With no more vectors than the block has queries for.
template <class Operands, int N = kTileVectors>
void attend_narrowest(const QueryBlock& block, const ForwardScratch& scratch) {
  if constexpr (N > 1)
    if (block.rows.count <= (N - 1) * kWidth) return attend_narrowest<Operands, N - 1>(block, scratch);
  attend<Operands, N>(block, scratch);
}

// Which block of which member a task is: tasks are the blocks of one member after another.
struct ForwardTasks {
  const AttentionParams& p;
  int64_t count = 0;
  double flops = 0;
  int64_t* ends;  // of each member's tasks, where members differ

  ForwardTasks(const AttentionParams& params, Arena& arena) : p(params), ends(nullptr) {
    const int64_t kinds = p.cu_seqlens_q ? p.batch : 1;
    if (p.cu_seqlens_q) ends = arena.array<int64_t>(size_t(p.batch));
    for (int64_t b = 0; b < kinds; ++b) {
      const Member member = member_of(p, b);
      count += QueryBlock::blocks_of_member(p, member) * p.kv_heads;
      flops += 2.0 * p.heads * double(member.seqlen_q) * double(member.seqlen_k) * double(p.head_dim + p.head_dim_v);
      if (ends) ends[b] = count;
    }
    if (!ends) per_member = count, count *= p.batch, flops *= double(p.batch);
  }

  QueryBlock operator[](int64_t task) const {
    const int64_t batch = ends ? std::upper_bound(ends, ends + p.batch, task) - ends : task / per_member;
    const Member member = member_of(p, batch);
    const int64_t inside = task - (ends ? (batch ? ends[batch - 1] : 0) : batch * per_member);
    const int64_t blocks = QueryBlock::blocks_of_member(p, member);
    return QueryBlock::at(p, member, inside / blocks, inside % blocks);
  }

 private:
  int64_t per_member = 0;
};

template <class Operands>
void forward_with(const AttentionParams& p, int threads) {
  static thread_local Arena plan;
  const ForwardTasks tasks(p, plan);
  parallel_for(tasks.count, is_small(tasks.flops) ? 1 : threads, [&](int64_t task) {
    static thread_local Arena arena;
    attend_narrowest<Operands>(tasks[task], ForwardScratch(p, arena));
  });
}

// Blocks of one head after another, so that its k and v stay in the cache; the last, with most keys if causal, first.
void forward(const AttentionParams& p, int threads) {
  if (p.heads == 0 || p.batch == 0 || p.seqlen_q == 0) return;
  if (suits_decoding(p)) return decode(p, threads);
#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
  if (p.q.element == Element::kBFloat16) return forward_with<PairOperands>(p, threads);
#endif
  forward_with<RealOperands>(p, threads);
}
