// What the key blocks of one query head share in backward: q and dout transposed, statistics of the rows, dQ'.
//
//   delta = rowsum(dout out) - dlse
//
// A step is a row or a dim; two of them where products add up pairs.

constexpr int kBlockM = 4 * kLanes;

// Of a score and its row's lse, lse + rest: never above 1, however lse was rounded. A NaN stays. What becomes one of a
// pair is rounded by more than rest can change.
template <class Operands>
INLINE Vec probability(Vec score, Vec lse, Vec rest) {
  const Vec x = Operands::kTerms == 1 ? score - lse - rest : score - lse;
  return Operands::power_of_2(no_more_than(Vec{}, x));
}

// Memory proportional to the sequence; queries come in blocks of kLanes ("lane blocks").
struct HeadScratch {
  int64_t q_steps, dout_steps;  // of a row
  int64_t q_row, dout_row;      // row lengths of the copies below; 0 where the tensors' own rows serve
  Real *qt, *dout_t;            // [lane block][step of dims][lane]; qt of Reals holds scale log2(e) q
  Real* dq_t;                   // [lane block][dim][lane]
  Real *lse, *lse_rest;         // their sum is lse in base 2; +inf for a row that sees nothing, so that its p is 0
  Real* delta;
  Real* bias_sums;             // of each query over the keys, where the bias is the same for all keys
  Real *q_rows, *dout_rows;    // [step of queries][dim] in whole vectors
  Real* slope_sums;            // of each key block
  std::atomic<int32_t>* turn;  // of a query block: the key block that adds to dQ' next
  int32_t* finite;             // of a query block: whether all of its q and dout is

  HeadScratch(const AttentionParams& p, const Member& member, int terms, Arena& arena)
      : q_steps(blocks_of(terms, p.head_dim)),
        dout_steps(blocks_of(terms, p.head_dim_v)),
        q_row(serve(p.q, p.head_dim) ? 0 : whole_vectors(p.head_dim)),
        dout_row(serve(p.dout, p.head_dim_v) ? 0 : whole_vectors(p.head_dim_v)) {
    const int64_t rows = blocks_of(kLanes, member.seqlen_q) * kLanes, flags = blocks_of(kBlockM, member.seqlen_q);
    const int64_t key_blocks = blocks_of(kBlockN, member.seqlen_k);
    const int64_t copies = rows / terms * (q_row + dout_row), dims = q_steps + dout_steps + p.head_dim;
    Real* at = arena.array<Real>(size_t(rows * (dims + 4) + copies + key_blocks + 2 * flags));
    const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    qt = take(rows * q_steps), dout_t = take(rows * dout_steps), dq_t = take(rows * p.head_dim);
    lse = take(rows), lse_rest = take(rows), delta = take(rows), bias_sums = take(rows);
    q_rows = take(rows / terms * q_row), dout_rows = take(rows / terms * dout_row);
    slope_sums = take(key_blocks);
    turn = reinterpret_cast<std::atomic<int32_t>*>(take(flags));
    finite = reinterpret_cast<int32_t*>(take(flags));
  }

  static bool serve(const View& x, int64_t dims) {
    return x.element == kReal && x.dim == int64_t(sizeof(Real)) && dims % kWidth == 0;
  }
};

struct BackwardHead {
  const AttentionParams& p;
  Member member;
  int64_t batch, head, kv_head;
  Visibility visible;
  HeadScratch scratch;
  mutable std::atomic<bool> failed{false};  // a key block found no memory

  BackwardHead(const AttentionParams& params, const Member& of, int64_t h, int terms, Arena& arena)
      : p(params),
        member(of),
        batch(of.batch),
        head(h),
        kv_head(h / (p.heads / p.kv_heads)),
        visible(visibility(p, of)),
        scratch(p, of, terms, arena) {}

  Interval rows_of(int64_t query_block) const {
    return Interval{query_block * kBlockM, (query_block + 1) * kBlockM}.intersect({0, member.seqlen_q});
  }

  // Rows for the broadcast side's partner, which is loaded in vectors: the tensor's or the copy's.
  Rows q_rows() const { return scratch.q_row ? Rows{scratch.q_rows, scratch.q_row} : rows_in_place(p.q); }
  Rows dout_rows() const {
    return scratch.dout_row ? Rows{scratch.dout_rows, scratch.dout_row} : rows_in_place(p.dout);
  }

  const Real* qt(int64_t first) const { return scratch.qt + first * scratch.q_steps; }
  const Real* dout_t(int64_t first) const { return scratch.dout_t + first * scratch.dout_steps; }

  // Everything of a query block that does not depend on keys.
  template <class Operands>
  void prepare(int64_t query_block) const {
    const Interval rows = rows_of(query_block);
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes) {
      const auto load_lanes = [&](Real* to, int64_t dims, const View& x, Real scale) INLINE_LAMBDA {
        Operands::template load_lanes<kTileVectors>(to, dims, x, scale, [&](int lane) { return row(x, first + lane); });
      };
      load_lanes(scratch.qt + first * scratch.q_steps, p.head_dim, p.q, base2_scale(p));
      load_lanes(scratch.dout_t + first * scratch.dout_steps, p.head_dim_v, p.dout, Real(1));
      std::memset(scratch.dq_t + first * p.head_dim, 0, size_t(kLanes * p.head_dim) * sizeof(Real));
      for (int64_t i = first; i < first + kLanes; ++i) set_statistics(i), prefetch_rows(i + kLanes);
    }
    const int64_t count = rows.hi - rows.lo;
    char *const q = row(p.q, rows.lo), *const dout = row(p.dout, rows.lo);
    const int64_t step = rows.lo / Operands::kTerms;
    if (scratch.q_row) Operands::copy_steps(scratch.q_rows + step * scratch.q_row, p.q, q, count, p.head_dim);
    if (scratch.dout_row)
      Operands::copy_steps(scratch.dout_rows + step * scratch.dout_row, p.dout, dout, count, p.head_dim_v);
    scratch.finite[query_block] =
        all_rows_finite(p.q, q, count, p.head_dim) && all_rows_finite(p.dout, dout, count, p.head_dim_v);
    new (&scratch.turn[query_block]) std::atomic<int32_t>(int32_t(visible.keys_of_any(rows).lo / kBlockN));
  }

  void store_dq(int64_t query_block) const {
    const Interval rows = rows_of(query_block);
    Vec factor[kTileVectors];
    for (Vec& x : factor) x = broadcast(Real(p.scale));
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes)
      store_transposed<kTileVectors>(scratch.dq_t + first * p.head_dim, p.head_dim, p.dq, factor,
                                     [&](int lane) { return row(p.dq, first + lane); });
  }

  // What all blocks have summed up, in their order.
  void store_option_gradients() const {
    if (p.dslopes) {
      Real total = 0;
      for (int64_t n = 0; n < blocks_of(kBlockN, member.seqlen_k); ++n) total += scratch.slope_sums[n];
      static_cast<Real*>(p.dslopes)[batch * p.heads + head] = total;
    }
    if (p.dbias.data && p.dbias.dim == 0)
      for (int64_t i = 0; i < member.seqlen_q; ++i)
        *reinterpret_cast<Real*>(p.dbias.at(batch, head, i)) += scratch.bias_sums[i];
  }

 private:
  Rows rows_in_place(const View& x) const {
    return {reinterpret_cast<const Real*>(x.at(batch, head, member.first_q)), x.seq / int64_t(sizeof(Real))};
  }

  // Null past the last query.
  INLINE char* row(const View& x, int64_t i) const {
    return i < member.seqlen_q ? x.at(batch, head, member.first_q + i) : nullptr;
  }

  // 1 % of the time in bfloat16. A row past the end does no harm.
  INLINE void prefetch_rows(int64_t i) const {
    const auto fetch = [&](const View& x, int64_t dims) INLINE_LAMBDA {
      prefetch(x.at(batch, head, member.first_q + i), 1, 0, dims * bytes_of(x.element));
    };
    fetch(p.q, p.head_dim), fetch(p.dout, p.head_dim_v), fetch(p.out, p.head_dim_v);
  }

  INLINE void set_statistics(int64_t i) const {
    const bool exists = i < member.seqlen_q;
    const int64_t at = batch * p.lse_batch + head * p.lse_head + member.first_q + i;
    const double natural = exists ? double(static_cast<const Real*>(p.lse)[at]) : -__builtin_inf();
    const double base2 = natural * kLog2EOf64;
    const bool empty = natural == -__builtin_inf();
    scratch.lse[i] = empty ? kInfinity : Real(base2);
    scratch.lse_rest[i] = empty ? Real(0) : Real(base2 - double(Real(base2)));
    if constexpr (sizeof(Real) == sizeof(double))
      if (!empty) scratch.lse_rest[i] = std::fma(natural, kLog2EOf64, -base2) + natural * kLog2ERest;
    scratch.bias_sums[i] = 0;
    Vec products{};
    for (int64_t d = 0; exists && d < p.head_dim_v; d += kWidth)
      products = fused(load_row(p.dout.element, row(p.dout, i) + d * p.dout.dim, p.dout.dim, p.head_dim_v - d),
                       load_row(p.out.element, row(p.out, i) + d * p.out.dim, p.out.dim, p.head_dim_v - d), products);
    scratch.delta[i] = sum(products) - (exists && p.dlse ? static_cast<const Real*>(p.dlse)[at] : Real(0));
    if (exists && p.delta) static_cast<Real*>(p.delta)[at] = scratch.delta[i];
  }

  static constexpr double kLog2ERest = 2.0355273740931033e-17;  // log2(e) less its nearest double
};
