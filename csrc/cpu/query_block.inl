// The queries of one task of forward, and where their keys are.

// Up to kLanes queries of one head; or, where a head has fewer, of several heads that share k and v.
struct QueryBlock {
  const AttentionParams& p;
  LaneRows rows;
  Interval queries;  // of every row
  Visibility visible;
  const char *k, *v;  // of the head
  bool opens_head;    // computed first, it finds k and v out of the cache

  // `index` counts the blocks of a kv head: those of one query head after another, the last rows first.
  static INLINE QueryBlock at(const AttentionParams& p, const Member& member, int64_t kv_head, int64_t index) {
    const int64_t group = p.heads / p.kv_heads, seqlen = member.seqlen_q, per_head = blocks_of(kLanes, seqlen);
    if (seqlen < kLanes) {
      const int64_t row = index * kLanes, count = smaller(kLanes, group * seqlen - row);
      const LaneRows rows = LaneRows::of_heads(member, kv_head * group, row, count);
      return QueryBlock(p, member, kv_head, rows, {0, seqlen}, index == 0);
    }
    const int64_t first = (per_head - 1 - index % per_head) * kLanes, count = smaller(kLanes, seqlen - first);
    const LaneRows rows = LaneRows::of_one_head(member, kv_head * group + index / per_head, first, count);
    return QueryBlock(p, member, kv_head, rows, {first, first + count}, index % per_head == 0);
  }

  // Up to kLanes queries of one head, from `first` on.
  static INLINE QueryBlock of_head(const AttentionParams& p, const Member& member, int64_t head, int64_t first) {
    const int64_t count = smaller(kLanes, member.seqlen_q - first);
    const LaneRows rows = LaneRows::of_one_head(member, head, first, count);
    return QueryBlock(p, member, head / (p.heads / p.kv_heads), rows, {first, first + count}, false);
  }

  // The rows of out, and of q in the block that comes next: 10 % of the time where many heads do not fit the cache. Of
  // a window also the keys that only the next block sees, 5 % of the time.
  INLINE void prefetch_rows() const {
    for (int lane = 0; lane < rows.count; ++lane) {
      prefetch(rows.row(p.out, lane), 1, 0, p.head_dim_v * bytes_of(p.out.element));
      if (rows.first >= kLanes)
        prefetch(rows.row(p.q, lane) - kLanes * p.q.seq, 1, 0, p.head_dim * bytes_of(p.q.element));
    }
    const Interval next = visible.keys_of_any({queries.lo - kLanes, queries.lo});
    if (p.window_left == kUnbounded || queries.lo < kLanes || next.empty()) return;
    const int64_t keys = smaller(kLanes, visible.keys_of_any(queries).lo - next.lo);
    prefetch(k + next.lo * p.k.seq, keys, p.k.seq, p.head_dim * bytes_of(p.k.element));
    prefetch(v + next.lo * p.v.seq, keys, p.v.seq, p.head_dim_v * bytes_of(p.v.element));
  }

  INLINE void store_lse(const Real* lse) const {
    Real* const to = static_cast<Real*>(p.lse) + rows.batch * p.lse_batch + rows.first_row;
    for (int lane = 0; lane < rows.count; ++lane) to[rows.head_of(lane) * p.lse_head + rows.query_of(lane)] = lse[lane];
  }

  static int64_t blocks_of_member(const AttentionParams& p, const Member& member) {
    const int64_t group = p.heads / p.kv_heads, seqlen = member.seqlen_q;
    return seqlen < kLanes ? blocks_of(kLanes, group * seqlen) : group * blocks_of(kLanes, seqlen);
  }

 private:
  INLINE QueryBlock(const AttentionParams& params, const Member& member, int64_t kv_head, const LaneRows& of,
                    Interval of_rows, bool opens)
      : p(params), rows(of), queries(of_rows), visible(visibility(p, member)), opens_head(opens) {
    k = p.k.at(member.batch, kv_head, member.first_k), v = p.v.at(member.batch, kv_head, member.first_k);
  }
};
