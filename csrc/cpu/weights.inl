// The probabilities themselves, or their mean over the heads, from the lse of forward.
//
//   weights = dropout exp2(score - lse)        the scores are those of forward, in tiles
//
// Heads that are averaged take turns at a tile, always in the same order. Each loads its queries again for every tile:
// some 4 % of the work, and no memory that grows with the number of heads.

// Of the rows of a block, in base 2: lse + rest.
template <int N>
struct RowStatistics {
  Vec lse[N], rest[N];

  INLINE RowStatistics(const AttentionParams& p, const LaneRows& rows) : lse{}, rest{} {
    const Real* const from = static_cast<const Real*>(p.lse) + rows.batch * p.lse_batch + rows.head * p.lse_head;
    for (int lane = 0; lane < rows.count; ++lane) {
      const Real natural = from[rows.query_of(lane)];
      const double base2 = double(natural) * kLog2EOf64;
      const bool empty = natural == -kInfinity;  // -inf - -inf would be nan: such a row has no weight anywhere
      lse[lane / kWidth][lane % kWidth] = empty ? kInfinity : Real(base2);
      rest[lane / kWidth][lane % kWidth] = empty ? Real(0) : Real(base2 - double(Real(base2)));
    }
  }
};

// sums[key][lane] += the probabilities of some keys.
template <class Operands, int N>
void add_probabilities(const QueryBlock& block, Interval tile_keys, const ForwardScratch& scratch, Real* sums) {
  const AttentionParams& p = block.p;
  const Interval range = block.visible.keys_of_any(block.queries).intersect(tile_keys);
  if (range.empty()) return;
  IntVec query[N];
  for (int lane = 0; lane < N * kWidth; ++lane) query[lane / kWidth][lane % kWidth] = block.rows.query[lane];
  const KeyTile<N> tile(p, block.k, block.v, block.visible, block.queries, query, range);
  const PairOptions<N> options(p, block.rows, block.visible);
  const bool shifted = PairOptions<N>::given(p);
  if (shifted && options.load_shift(range, tile.mask, scratch.shift) == Shown::kNone) return;
  Operands::template load_lanes<N>(scratch.qt, p.head_dim, p.q, base2_scale(p),
                                   [&](int lane) { return block.rows.row(p.q, lane); });
  Vec tile_max[N];
  score_tile<Operands>(block, tile, scratch, shifted ? &options : nullptr, tile_max);
  const RowStatistics<N> of(p, block.rows);
  const auto add = [&](int64_t j, int n, IntVec kept) INLINE_LAMBDA {
    const int64_t at = (j * N + n) * kWidth;
    const Vec weight = exp2(load(scratch.scores + at) - of.lse[n] - of.rest[n]);
    Real* const to = sums + (range.lo - tile_keys.lo) * N * kWidth + at;
    store(to, load(to) + (kept ? weight : Vec{}));
  };
  if (p.dropout_seed) return for_kept<N>(p, block.rows, range, add);
  for (int64_t j = 0; j < tile.keys; ++j) repeat<N>(EACH(n) { add(j, n, ~IntVec{}); });
}

// Up to kLanes queries from `first` on, of one head or of several that are averaged.
template <class Operands, int N = kTileVectors>
void weigh(const AttentionParams& p, const Member& member, Interval heads, int64_t first, const ForwardScratch& scratch,
           Real* sums) {
  const int64_t count = smaller(kLanes, member.seqlen_q - first);
  if constexpr (N > 1)
    if (count <= (N - 1) * kWidth) return weigh<Operands, N - 1>(p, member, heads, first, scratch, sums);
  const LaneRows rows = LaneRows::of_one_head(member, heads.lo, first, count);
  Vec factor[N];
  for (Vec& x : factor) x = broadcast(Real((p.dropout_seed ? p.dropout_scale : 1.0) / double(heads.hi - heads.lo)));
  for (int64_t start_n = 0; start_n < member.seqlen_k; start_n += kBlockN) {
    const Interval keys{start_n, smaller(start_n + kBlockN, member.seqlen_k)};
    std::fill_n(sums, kBlockN * N * kWidth, Real(0));
    for (int64_t head = heads.lo; head < heads.hi; ++head)
      add_probabilities<Operands, N>(QueryBlock::of_head(p, member, head, first), keys, scratch, sums);
    store_transposed<N>(sums, keys.hi - keys.lo, p.out, factor, [&](int lane) {
      char* const row = rows.row(p.out, lane);
      return row ? row + start_n * p.out.dim : nullptr;
    });
  }
}

template <class Operands>
void weights_with(const AttentionParams& p, bool average, int threads) {
  const int64_t blocks = blocks_of(kLanes, p.seqlen_q), heads = average ? 1 : p.heads;
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.seqlen_q) * double(p.seqlen_k) * double(p.head_dim);
  parallel_for(p.batch * heads * blocks, is_small(flops) ? 1 : threads, [&](int64_t task) {
    static thread_local Arena arena, of_sums;
    const int64_t head = task / blocks % heads;
    weigh<Operands>(p, member_of(p, task / blocks / heads), average ? Interval{0, p.heads} : Interval{head, head + 1},
                    task % blocks * kLanes, ForwardScratch(p, arena), of_sums.array<Real>(kBlockN * kLanes));
  });
}

// p.out is (batch, heads, seqlen_q, seqlen_k), or with the one head of the mean; there are no values, and v is k.
void weights(const AttentionParams& p, bool average, int threads) {
  if (p.heads == 0 || p.batch == 0 || p.seqlen_q == 0 || p.seqlen_k == 0) return;
#if defined(ISA_BF16) && !defined(REAL_IS_DOUBLE)
  if (p.q.element == Element::kBFloat16) return weights_with<PairOperands>(p, average, threads);
#endif
  weights_with<RealOperands>(p, average, threads);
}
