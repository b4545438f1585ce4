// Forward: online softmax over tiles of keys, with one lane a query, so that k and v are read as they are.
//
//   S' = K Q'        p = exp2(S' - row_max)        O' = rescale O' + V' p        (' is transposed)
//
// Q' contains scale log2(e). Source: Dao, "FlashAttention-2", 2023, Algorithm 1.
// A tile starts at a multiple of kBlockN whatever is visible, and a key that a row does not see changes none of its
// bits; so those depend on the row alone, not on its neighbours, lane or batch.

constexpr int kBlockN = 128;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471824645996f, kLn2Rest = -1.9046542e-9f;  // their sum is ln(2)
constexpr float kInfinity = __builtin_inff();

// Up to kLanes queries of one head; or, where a head has fewer, of several heads that share k and v.
struct QueryBlock {
  const AttentionParams& p;
  int64_t batch, head, first, count;  // rows [first, first + count) of the heads from `head` on
  Interval queries;                   // of every row
  Visibility visible;
  const float *k, *v;                       // of the head
  int32_t query[kLanes], row_head[kLanes];  // from queries.lo and from head
  bool opens_head;                          // computed first, it finds k and v out of the cache

  INLINE QueryBlock(const AttentionParams& params, int64_t b, int64_t h, int64_t row, int64_t rows)
      : p(params), batch(b), head(h), first(row), count(smaller(kLanes, rows - row)), opens_head(row + kLanes >= rows) {
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    k = p.k.head_of(batch, kv_head), v = p.v.head_of(batch, kv_head), visible = visibility(p, batch);
    const bool one_head = rows == p.seqlen_q;
    queries = one_head ? Interval{first, first + count} : Interval{0, p.seqlen_q};
    int32_t at = int32_t(one_head ? 0 : first % p.seqlen_q), of = int32_t(one_head ? 0 : first / p.seqlen_q);
    for (int lane = 0; lane < kLanes; ++lane) {
      query[lane] = at;
      row_head[lane] = of;
      if (!one_head && ++at == p.seqlen_q) at = 0, ++of;
      if (one_head) ++at;
    }
  }

  // The rows of out, and of q in the block that comes next: 10 % of the time where many heads do not fit the cache.
  INLINE void prefetch_rows() const {
    for (int lane = 0; lane < count; ++lane) {
      prefetch(row(p.out, lane), 1, 0, p.head_dim_v);
      if (first >= kLanes) prefetch(row(p.q, lane) - kLanes * p.q.seq, 1, 0, p.head_dim);
    }
  }

  // The row of a lane in q or out; null past the last one.
  INLINE float* row(const View& x, int lane) const {
    if (lane >= count) return nullptr;
    return x.head_of(batch, head + row_head[lane]) + (queries.lo + query[lane]) * x.seq;
  }

  INLINE float* lse() const { return p.lse + (batch * p.heads + head) * p.seqlen_q + first; }
};

template <int N>
struct OnlineSoftmax {
  Vec row_max[N], row_sum[N];  // in base 2
  Vec pivot[N], rescale[N];    // of the current tile

  INLINE void start() {
    for (int n = 0; n < N; ++n) row_max[n] = broadcast(-kInfinity), row_sum[n] = Vec{};
  }

  // scores -> p, in place
  INLINE void update(float* scores, int64_t keys, const Vec (&tile_max)[N]) {
    Vec tile_sum[N] = {};
    repeat<N>(EACH(n) {
      const Vec highest = larger(row_max[n], tile_max[n]);
      // -inf - -inf would be nan: a row that has seen no key keeps a finite pivot.
      pivot[n] = highest == -kInfinity ? Vec{} : highest;
      rescale[n] = exp2(row_max[n] - pivot[n]);
      row_max[n] = highest;
    });
    for (int64_t j = 0; j < keys; ++j, scores += N * kWidth)
      repeat<N>(EACH(n) {
        const Vec p = exp2(load(scores + n * kWidth) - pivot[n]);
        tile_sum[n] += p;
        store(scores + n * kWidth, p);
      });
    repeat<N>(EACH(n) { row_sum[n] = fused(row_sum[n], rescale[n], tile_sum[n]); });
  }

  // What out' is multiplied with, and lse.
  INLINE void finish(Vec (&factor)[N], Vec (&lse)[N]) const {
    repeat<N>(EACH(n) {
      const auto empty = row_sum[n] == 0.0f;
      factor[n] = 1.0f / (empty ? broadcast(1.0f) : row_sum[n]);
      lse[n] = fused(row_max[n], broadcast(kLn2), fused(row_max[n], broadcast(kLn2Rest), log(row_sum[n])));
      lse[n] = empty ? broadcast(-kInfinity) : lse[n];
    });
  }
};

// Keys [first, first + keys) of a tile, and what the rows of a block see of them.
template <int N>
struct KeyTile {
  const float *k, *v;  // rows of the first key
  int64_t keys;
  Interval common;  // keys that all rows see; it and the mask count from the first key
  LaneMask<N> mask;
  bool guarded;  // a value that some row does not see is not finite: 0 * inf would be nan

  INLINE KeyTile(const QueryBlock& block, const IntVec (&query)[N], Interval range)
      : k(block.k + range.lo * block.p.k.seq),
        v(block.v + range.lo * block.p.v.seq),
        keys(range.hi - range.lo),
        mask(block.visible, block.queries.lo, query, range.lo) {
    common = block.visible.keys_of_all(block.queries).intersect(range);
    if (common.empty()) common = {range.lo, range.lo};
    common = {common.lo - range.lo, common.hi - range.lo};
    const View& x = block.p.v;
    const int64_t dims = block.p.head_dim_v;
    guarded = !(all_rows_finite(v, common.lo, x.seq, dims, x.dim) &&
                all_rows_finite(v + common.hi * x.seq, keys - common.hi, x.seq, dims, x.dim));
  }
};

// scores = K Q', and the largest score of each row.
template <int N>
INLINE void score_tile(const QueryBlock& block, const KeyTile<N>& tile, const float* qt, float* scores,
                       Vec (&tile_max)[N]) {
  const AttentionParams& p = block.p;
  repeat<N>(EACH(n) { tile_max[n] = broadcast(-kInfinity); });
  for_row_tiles(0, tile.keys, [&](auto height, int64_t j) INLINE_LAMBDA {
    if (block.opens_head) {
      prefetch(tile.v + j * p.v.seq, height, p.v.seq, p.head_dim_v);
      prefetch(tile.k + (kBlockN + j) * p.k.seq, height, p.k.seq, p.head_dim);
    }
    Tile<height, N> s;
    s.clear();
    s.multiply_add({tile.k + j * p.k.seq, p.k.seq, p.k.dim}, qt, N * kWidth, p.head_dim);
    if (!tile.common.contains({j, j + height}))
      s.map([&](Vec x, auto m, auto n)
                INLINE_LAMBDA { return tile.mask.sees(int32_t(j + m), n) ? x : broadcast(-kInfinity); });
    s.map([&](Vec x, auto m, auto n) INLINE_LAMBDA {
      tile_max[n] = larger(tile_max[n], x);
      store(scores + ((j + m) * N + n) * kWidth, x);
      return x;
    });
  });
}

// out' = rescale out' + V' weights
template <int N>
INLINE void add_values(const AttentionParams& p, const KeyTile<N>& tile, const float* weights, const Vec (&rescale)[N],
                       float* out_t) {
  for_row_tiles(0, p.head_dim_v, [&](auto height, int64_t d) INLINE_LAMBDA {
    const Broadcast v_t{tile.v + d * p.v.dim, p.v.dim, p.v.seq};
    Tile<height, N> o;
    o.clear();
    if (tile.guarded)
      o.multiply_add_where(v_t, weights, N * kWidth, tile.keys,
                           [&](int64_t j, int n) INLINE_LAMBDA { return tile.mask.sees(int32_t(j), n); });
    else
      o.multiply_add(v_t, weights, N * kWidth, tile.keys);
    o.map([&](Vec x, auto m, auto n) INLINE_LAMBDA {
      float* at = out_t + ((d + m) * N + n) * kWidth;
      store(at, fused(load(at), rescale[n], x));
      return x;
    });
  });
}

template <int N>
void attend(const QueryBlock& block, float* scratch) {
  const AttentionParams& p = block.p;
  float *qt = scratch, *out_t = qt + p.head_dim * kLanes, *scores = out_t + p.head_dim_v * kLanes;
  const Interval keys = block.visible.keys_of_any(block.queries);
  IntVec query[N];
  std::memcpy(query, block.query, sizeof(query));

  load_transposed<N>(qt, p.head_dim, p.q.dim, p.scale * kLog2E, [&](int lane) { return block.row(p.q, lane); });
  std::memset(out_t, 0, size_t(p.head_dim_v) * N * kWidth * sizeof(float));
  block.prefetch_rows();
  OnlineSoftmax<N> softmax;
  softmax.start();
  for (int64_t start_n = keys.lo / kBlockN * kBlockN; start_n < keys.hi; start_n += kBlockN) {
    const KeyTile<N> tile(block, query, keys.intersect({start_n, start_n + kBlockN}));
    Vec tile_max[N];
    score_tile(block, tile, qt, scores, tile_max);
    softmax.update(scores, tile.keys, tile_max);
    add_values(p, tile, scores, softmax.rescale, out_t);
  }
  Vec factor[N], lse[N];
  softmax.finish(factor, lse);
  store_transposed<N>(out_t, p.head_dim_v, p.out.dim, factor, [&](int lane) { return block.row(p.out, lane); });
  std::memcpy(block.lse(), lse, size_t(block.count) * sizeof(float));
}

// With no more vectors than the block has queries for.
template <int N = kTileVectors>
void attend_narrowest(const QueryBlock& block, float* scratch) {
  if constexpr (N > 1)
    if (block.count <= (N - 1) * kWidth) return attend_narrowest<N - 1>(block, scratch);
  attend<N>(block, scratch);
}

// Blocks of one head after another, so that its k and v stay in the cache; the last, with most keys if causal, first.
void forward(const AttentionParams& p, int threads) {
  if (p.heads == 0 || p.batch == 0 || p.seqlen_q == 0) return;
  const int64_t heads = p.seqlen_q < kLanes ? p.heads / p.kv_heads : 1;  // in one block
  const int64_t rows = heads * p.seqlen_q, blocks = blocks_of(kLanes, rows);
  const double flops = 2.0 * p.batch * p.heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v);
  parallel_for(p.batch * p.heads / heads * blocks, is_small(flops) ? 1 : threads, [&](int64_t task) {
    static thread_local Arena arena;
    float* scratch = arena.floats((p.head_dim + p.head_dim_v + kBlockN) * kLanes);
    const int64_t head = task / blocks * heads, block = blocks - 1 - task % blocks;
    attend_narrowest(QueryBlock(p, head / p.heads, head % p.heads, block * kLanes, rows), scratch);
  });
}
