// Backward: the probabilities again, from lse, then five products for each pair of a key block and a query block.
//
//   P' = exp2(K Q' - lse)     dS' = P' (V dO' - delta)
//   dv += P' dout             dk += scale dS' q             dQ' += scale K' dS'         (' is transposed)
//
// A key block owns its rows of dk and dv. All of them add to dQ', in the order of the keys whatever the threads.

// Some keys of a head, and their gradients as far as they are summed.
struct KeyBlock {
  const BackwardHead& head;
  const AttentionParams& p;
  const Visibility& visible;
  Interval keys;
  const float *k, *v;  // rows of the first key
  bool finite;         // whether all of k and v is
  int64_t dk_row, dv_row;
  float *weights, *dscores;  // [key][query]: P' and dS' of the current query block
  float *dk, *dv;            // [key][dim] in whole vectors

  KeyBlock(const BackwardHead& of, int64_t n, Arena& arena)
      : head(of),
        p(of.p),
        visible(of.visible),
        keys(Interval{n * kBlockN, (n + 1) * kBlockN}.intersect({0, p.seqlen_k})),
        k(p.k.head_of(of.batch, of.kv_head) + keys.lo * p.k.seq),
        v(p.v.head_of(of.batch, of.kv_head) + keys.lo * p.v.seq),
        dk_row(blocks_of(kWidth, p.head_dim) * kWidth),
        dv_row(blocks_of(kWidth, p.head_dim_v) * kWidth) {
    const int64_t count = keys.hi - keys.lo;
    finite = all_rows_finite(k, count, p.k.seq, p.head_dim, p.k.dim) &&
             all_rows_finite(v, count, p.v.seq, p.head_dim_v, p.v.dim);
    weights = arena.floats(size_t(kBlockN * (2 * kBlockM + dk_row + dv_row)));
    dscores = weights + kBlockN * kBlockM;
    dk = dscores + kBlockN * kBlockM, dv = dk + kBlockN * dk_row;
    std::memset(dk, 0, size_t(kBlockN * (dk_row + dv_row)) * sizeof(float));
  }

  void add_query_block(int64_t m, int64_t n) {
    const Interval rows = head.rows_of(m), seen = seen_by(rows);
    const bool guarded = !(finite && head.scratch.finite[m]);
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes)
      score(first, first - rows.lo, {first, smaller(first + kLanes, rows.hi)});
    if (p.dv.data) add_rows(dv, dv_row, weights, head.dout_rows(), rows, seen, guarded);
    if (p.dk.data) add_rows(dk, dk_row, dscores, head.q_rows(), rows, seen, guarded);
    if (p.dq.data) add_to_dq(rows, m, n, guarded);
  }

  void store_gradients(bool adds) const {
    if (p.dk.data) store_rows(p.dk, p.head_dim, dk, dk_row, p.scale, adds);
    if (p.dv.data) store_rows(p.dv, p.head_dim_v, dv, dv_row, 1.0f, adds);
  }

 private:
  // Keys that some of the rows see, counted from the first one, and in whole tiles: add_rows reads such tiles.
  Interval seen_by(Interval rows) const {
    const Interval seen = visible.keys_of_any(rows).intersect(keys);
    if (seen.empty()) return {0, 0};
    const int64_t first = (seen.lo - keys.lo) / kTileRows * kTileRows;
    return {first, smaller(blocks_of(kTileRows, seen.hi - keys.lo) * kTileRows, keys.hi - keys.lo)};
  }

  LaneMask<kTileVectors> mask_of(int64_t first) const {
    IntVec query[kTileVectors];
    for (int i = 0; i < kLanes; ++i) query[i / kWidth][i % kWidth] = i;
    return LaneMask<kTileVectors>(visible, first, query, keys.lo);
  }

  // weights and dscores for the queries of a lane block.
  void score(int64_t first, int64_t column, Interval rows) {
    const LaneMask<kTileVectors> mask = mask_of(first);
    const Interval all = visible.keys_of_all(rows), common = {all.lo - keys.lo, all.hi - keys.lo};
    const Interval seen = seen_by(rows);
    const float *qt = head.scratch.qt + first * p.head_dim, *dout_t = head.scratch.dout_t + first * p.head_dim_v;
    Vec lse[kTileVectors], rest[kTileVectors], delta[kTileVectors];
    std::memcpy(lse, head.scratch.lse + first, sizeof(lse));
    std::memcpy(rest, head.scratch.lse_rest + first, sizeof(rest));
    std::memcpy(delta, head.scratch.delta + first, sizeof(delta));
    for_row_tiles(seen.lo, seen.hi, [&](auto height, int64_t j) INLINE_LAMBDA {
      const bool masked = !common.contains({j, j + height});
      const auto hide = [&](Tile<height, kTileVectors>& x) INLINE_LAMBDA {
        x.map([&](Vec x, auto m, auto n) INLINE_LAMBDA { return mask.sees(int32_t(j + m), n) ? x : Vec{}; });
      };
      Tile<height, kTileVectors> x;
      x.clear();
      x.multiply_add({k + j * p.k.seq, p.k.seq, p.k.dim}, qt, kLanes, p.head_dim);
      x.map([&](Vec x, auto, auto n) INLINE_LAMBDA { return exp2(x - lse[n] - rest[n]); });
      if (masked) hide(x);
      x.map([&](Vec x, auto m, auto n) INLINE_LAMBDA { return store(weights + at(j + m, column, n), x), Vec{}; });
      x.multiply_add({v + j * p.v.seq, p.v.seq, p.v.dim}, dout_t, kLanes, p.head_dim_v);
      x.map([&](Vec x, auto m, auto n) INLINE_LAMBDA { return load(weights + at(j + m, column, n)) * (x - delta[n]); });
      if (masked) hide(x);
      x.map([&](Vec x, auto m, auto n) INLINE_LAMBDA { return store(dscores + at(j + m, column, n), x), x; });
    });
  }

  static INLINE int64_t at(int64_t key, int64_t column, int n) { return key * kBlockM + column + n * kWidth; }

  // sum[key] += a[key, query] * b[query] over the queries that see the key, or of a tile of keys one of them.
  void add_rows(float* sum, int64_t sum_row, const float* a, Rows b, Interval rows, Interval seen, bool guarded) {
    for_vector_tiles(0, sum_row / kWidth, [&](auto width, int64_t n) INLINE_LAMBDA {
      const auto add = [&](auto height, int64_t j) INLINE_LAMBDA {
        const Interval see = visible.rows_of_any({keys.lo + j, keys.lo + j + height}, p.seqlen_q).intersect(rows);
        Tile<height, width> x;
        x.clear();
        x.multiply_add({a + at(j, see.lo - rows.lo, 0), kBlockM, 1}, b.data + see.lo * b.row + n * kWidth, b.row,
                       see.hi - see.lo);
        x.map([&](Vec x, auto r, auto c) INLINE_LAMBDA {
          float* to = sum + (j + r) * sum_row + (n + c) * kWidth;
          return store(to, load(to) + x), x;
        });
      };
      if (guarded)
        for_row_tiles<1>(seen.lo, seen.hi, add);
      else
        for_row_tiles(seen.lo, seen.hi, add);
    });
  }

  // dQ' += K' dS', when all key blocks before this one have done so.
  void add_to_dq(Interval rows, int64_t m, int64_t n, bool guarded) {
    std::atomic<int32_t>& turn = head.scratch.turn[m];
    while (turn.load(std::memory_order_acquire) != n) {
      if (head.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
      std::this_thread::yield();
    }
    for (int64_t first = rows.lo; first < rows.hi; first += kLanes)
      add_to_lane_block(first, dscores + first - rows.lo, seen_by({first, smaller(first + kLanes, rows.hi)}), guarded);
    turn.store(int32_t(n + 1), std::memory_order_release);
  }

  void add_to_lane_block(int64_t first, const float* dscores, Interval seen, bool guarded) {
    const LaneMask<kTileVectors> mask = mask_of(first);
    float* dq_t = head.scratch.dq_t + first * p.head_dim;
    const Broadcast k_t = {k + seen.lo * p.k.seq, p.k.dim, p.k.seq};
    for_row_tiles(0, p.head_dim, [&](auto height, int64_t d) INLINE_LAMBDA {
      Tile<height, kTileVectors> x;
      x.clear();
      if (guarded)
        x.multiply_add_where(k_t.rows_from(d), dscores + at(seen.lo, 0, 0), kBlockM, seen.hi - seen.lo,
                             [&](int64_t j, int n) INLINE_LAMBDA { return mask.sees(int32_t(seen.lo + j), n); });
      else
        x.multiply_add(k_t.rows_from(d), dscores + at(seen.lo, 0, 0), kBlockM, seen.hi - seen.lo);
      x.map([&](Vec x, auto r, auto n) INLINE_LAMBDA {
        float* to = dq_t + (d + r) * kLanes + n * kWidth;
        return store(to, load(to) + x), x;
      });
    });
  }

  void store_rows(const View& x, int64_t dims, const float* from, int64_t from_row, float factor, bool adds) const {
    float* to = x.head_of(head.batch, head.kv_head) + keys.lo * x.seq;
    for (int64_t j = 0; j < keys.hi - keys.lo; ++j)
      for (int64_t d = 0; d < dims; d += kWidth) {
        float* at = to + j * x.seq + d * x.dim;
        const Vec before = adds ? load_some(at, x.dim, dims - d) : Vec{};
        store_some(at, x.dim, dims - d, fused(load(from + j * from_row + d), broadcast(factor), before));
      }
  }
};

void add_key_block(const BackwardHead& head, int64_t n) try {
  static thread_local Arena arena;
  KeyBlock block(head, n, arena);
  const Interval rows = head.visible.rows_of_any(block.keys, head.p.seqlen_q);
  for (int64_t m = rows.lo / kBlockM; m * kBlockM < rows.hi; ++m) block.add_query_block(m, n);
  block.store_gradients(head.head % (head.p.heads / head.p.kv_heads) != 0);
} catch (...) {
  head.failed = true;  // or the blocks after this one would wait for its turn for ever
  throw;
}

// Each thread takes the query heads of a kv head, one after another; or they share the blocks of one head, if few.
void backward(const AttentionParams& p, int threads) {
  if (p.batch == 0 || p.heads == 0) return;
  const double flops = 5.0 * p.batch * p.heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v);
  if (is_small(flops)) threads = 1;
  const int64_t group = p.heads / p.kv_heads, tasks = p.batch * p.kv_heads;
  const int inside = tasks < threads ? threads : 1;
  parallel_for(tasks, inside > 1 ? 1 : threads, [&](int64_t task) {
    static thread_local Arena arena;
    for (int64_t h = task * group; h < (task + 1) * group; ++h) {
      const BackwardHead head(p, h / p.heads, h % p.heads, arena);
      const int64_t query_blocks = blocks_of(kBlockM, p.seqlen_q);
      parallel_for(query_blocks, inside, [&](int64_t m) { head.prepare(m); });
      parallel_for(blocks_of(kBlockN, p.seqlen_k), inside, [&](int64_t n) { add_key_block(head, n); });
      if (p.dq.data) parallel_for(query_blocks, inside, [&](int64_t m) { head.store_dq(m); });
    }
    arena.trim();
  });
}
