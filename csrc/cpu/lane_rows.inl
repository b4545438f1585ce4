// The queries that the lanes of a block stand for.

struct LaneRows {
  int64_t batch, head, first;               // of lane 0
  int64_t count;                            // lanes that stand for a query
  int64_t first_row;                        // of the batch member, in tensors
  int32_t query[kLanes], row_head[kLanes];  // from `first` and from `head`

  INLINE int64_t query_of(int lane) const { return first + query[lane]; }
  INLINE int64_t head_of(int lane) const { return head + row_head[lane]; }

  // A lane's row in q or out, or in a mask or bias; null past the last one.
  INLINE char* row(const View& x, int lane) const {
    return lane < count ? x.at(batch, head_of(lane), first_row + query_of(lane)) : nullptr;
  }

  // `count` successive queries of one head.
  static INLINE LaneRows of_one_head(const Member& member, int64_t head, int64_t first, int64_t count) {
    LaneRows rows{member.batch, head, first, count, member.first_q, {}, {}};
    for (int lane = 0; lane < kLanes; ++lane) rows.query[lane] = lane;
    return rows;
  }

  // Queries [row, row + count) of the heads from `head` on, counted through.
  static INLINE LaneRows of_heads(const Member& member, int64_t head, int64_t row, int64_t count) {
    LaneRows rows{member.batch, head, 0, count, member.first_q, {}, {}};
    int32_t query = int32_t(row % member.seqlen_q), of = int32_t(row / member.seqlen_q);
    for (int lane = 0; lane < kLanes; ++lane) {
      rows.query[lane] = query, rows.row_head[lane] = of;
      if (++query == member.seqlen_q) query = 0, ++of;
    }
    return rows;
  }
};
