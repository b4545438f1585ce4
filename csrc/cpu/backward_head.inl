// What the key blocks of one query head share in backward: q and dout transposed, statistics of the rows, dQ'.
//
//   delta = rowsum(dout out) - dlse

constexpr int kBlockM = kLanes < 24 ? 4 * kLanes : 2 * kLanes;

// Memory proportional to the queries, which come in blocks of kLanes ("lane blocks").
struct HeadScratch {
  int64_t q_row, dout_row;    // row lengths of the copies below; 0 where the tensors' own rows serve
  float *qt, *dout_t, *dq_t;  // [lane block][dim][lane]; qt holds scale log2(e) q
  float *lse, *lse_rest;      // their sum is lse in base 2; +inf for a row that sees nothing, so that its p is 0
  float* delta;
  float *q_rows, *dout_rows;   // [query][dim] in whole vectors
  std::atomic<int32_t>* turn;  // of a query block: the key block that adds to dQ' next
  int32_t* finite;             // of a query block: whether all of its q and dout is

  HeadScratch(const AttentionParams& p, Arena& arena)
      : q_row(serve(p.q, p.head_dim) ? 0 : blocks_of(kWidth, p.head_dim) * kWidth),
        dout_row(serve(p.dout, p.head_dim_v) ? 0 : blocks_of(kWidth, p.head_dim_v) * kWidth) {
    const int64_t rows = blocks_of(kLanes, p.seqlen_q) * kLanes, flags = blocks_of(kBlockM, p.seqlen_q);
    const int64_t dims = 2 * p.head_dim + p.head_dim_v + q_row + dout_row;
    float* at = arena.floats(size_t(rows * (dims + 3) + 2 * flags));
    const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    qt = take(rows * p.head_dim), dout_t = take(rows * p.head_dim_v), dq_t = take(rows * p.head_dim);
    lse = take(rows), lse_rest = take(rows), delta = take(rows);
    q_rows = take(rows * q_row), dout_rows = take(rows * dout_row);
    turn = reinterpret_cast<std::atomic<int32_t>*>(take(flags));
    finite = reinterpret_cast<int32_t*>(take(flags));
  }

  static bool serve(const View& x, int64_t dims) { return x.dim == 1 && dims % kWidth == 0; }
};

struct BackwardHead {
  const AttentionParams& p;
  int64_t batch, head, kv_head;
  Visibility visible;
  HeadScratch scratch;
  mutable std::atomic<bool> failed{false};  // a key block found no memory

  BackwardHead(const AttentionParams& params, int64_t b, int64_t h, Arena& arena)
      : p(params),
        batch(b),
        head(h),
        kv_head(h / (p.heads / p.kv_heads)),
        visible(visibility(p, b)),
        scratch(p, arena) {}

  Interval rows_of(int64_t query_block) const {
    return Interval{query_block * kBlockM, (query_block + 1) * kBlockM}.intersect({0, p.seqlen_q});
  }

  // Rows for the broadcast side's partner, which is loaded in vectors: the tensor's or the copy's.
  Rows q_rows() const { return scratch.q_row ? Rows{scratch.q_rows, scratch.q_row} : rows_in_place(p.q); }
  Rows dout_rows() const {
    return scratch.dout_row ? Rows{scratch.dout_rows, scratch.dout_row} : rows_in_place(p.dout);
  }
  Rows rows_in_place(const View& x) const { return {x.head_of(batch, head), x.seq}; }

  // Everything of a query block that does not depend on keys.
  void prepare(int64_t query_block) const {
    const Interval rows = rows_of(query_block);
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes) {
      load_lane_block(p.q, p.head_dim, p.scale * kLog2E, first, scratch.qt);
      load_lane_block(p.dout, p.head_dim_v, 1.0f, first, scratch.dout_t);
      std::memset(scratch.dq_t + first * p.head_dim, 0, size_t(kLanes * p.head_dim) * sizeof(float));
      for (int64_t i = first; i < first + kLanes; ++i) set_statistics(i);
    }
    if (scratch.q_row) copy_rows(p.q, p.head_dim, rows, scratch.q_rows, scratch.q_row);
    if (scratch.dout_row) copy_rows(p.dout, p.head_dim_v, rows, scratch.dout_rows, scratch.dout_row);
    scratch.finite[query_block] = all_finite(p.q, p.head_dim, rows) && all_finite(p.dout, p.head_dim_v, rows);
    new (&scratch.turn[query_block]) std::atomic<int32_t>(int32_t(visible.keys_of_any(rows).lo / kBlockN));
  }

  void store_dq(int64_t query_block) const {
    const Interval rows = rows_of(query_block);
    Vec factor[kTileVectors];
    for (Vec& x : factor) x = broadcast(p.scale);
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes)
      store_transposed<kTileVectors>(scratch.dq_t + first * p.head_dim, p.head_dim, p.dq.dim, factor,
                                     [&](int lane) { return row(p.dq, first + lane); });
  }

 private:
  // Null past the last query.
  INLINE float* row(const View& x, int64_t i) const {
    return i < p.seqlen_q ? x.head_of(batch, head) + i * x.seq : nullptr;
  }

  INLINE void load_lane_block(const View& x, int64_t dims, float scale, int64_t first, float* to) const {
    load_transposed<kTileVectors>(to + first * dims, dims, x.dim, scale,
                                  [&](int lane) { return row(x, first + lane); });
  }

  void copy_rows(const View& x, int64_t dims, Interval rows, float* to, int64_t to_row) const {
    for (int64_t i = rows.lo; i < rows.hi; ++i)
      for (int64_t d = 0; d < dims; d += kWidth)
        store(to + i * to_row + d, load_some(row(x, i) + d * x.dim, x.dim, dims - d));
  }

  bool all_finite(const View& x, int64_t dims, Interval rows) const {
    return all_rows_finite(row(x, rows.lo), rows.hi - rows.lo, x.seq, dims, x.dim);
  }

  INLINE void set_statistics(int64_t i) const {
    const bool exists = i < p.seqlen_q;
    const int64_t at = (batch * p.heads + head) * p.seqlen_q + i;
    const double base2 = exists ? p.lse[at] * 1.4426950408889634 : -kInfinity;
    const bool empty = base2 == -kInfinity;
    scratch.lse[i] = empty ? kInfinity : float(base2);
    scratch.lse_rest[i] = empty ? 0.0f : float(base2 - float(base2));
    Vec products{};
    for (int64_t d = 0; exists && d < p.head_dim_v; d += kWidth)
      products = fused(load_some(row(p.dout, i) + d * p.dout.dim, p.dout.dim, p.head_dim_v - d),
                       load_some(row(p.out, i) + d * p.out.dim, p.out.dim, p.head_dim_v - d), products);
    scratch.delta[i] = sum(products) - (exists && p.dlse ? p.dlse[at] : 0.0f);
  }
};
