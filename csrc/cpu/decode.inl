// Decoding: few queries for each k and v head, where memory is the limit. Here head_dim lies along the lanes of the
// products, so that every row of k and v is loaded once for all queries of its group; the softmax has a query a lane,
// as everywhere.
//
//   scores[j, r] = q_r . k_j          out_r = sum_j p[j, r] v_j
//
// Keys are split in ranges of kDecodeKeys, by their number alone, whose results are merged in order: however many
// threads share them, the bits are the same.

constexpr int64_t kDecodeKeys = 1024;
constexpr int kDecodeRows = kWidth < 8 ? kWidth : 8;

// What a range of keys gives: statistics with a row a lane, out as [row][dim].
struct DecodePart {
  Real *row_max, *row_sum, *out;

  static int64_t size_of(const AttentionParams& p, int rows) { return 2 * kWidth + rows * p.head_dim_v; }
  explicit DecodePart(Real* at) : row_max(at), row_sum(at + kWidth), out(at + 2 * kWidth) {}
};

// Lane i of the result is the sum of x[i].
INLINE Vec sum_each(Vec (&x)[kWidth]) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = interleave(x[i], x[i + half], make_int_list<kWidth>{}, false) +
             interleave(x[i], x[i + half], make_int_list<kWidth>{}, true);
  return x[0];
}

template <class Source, class Rows, int R>
struct Decoder {
  const QueryBlock& block;
  const AttentionParams& p;
  const bool shifted;
  const int64_t step;        // from key to key in scores: the rows, or with options a vector
  Real *q, *scores, *shift;  // q: [row][vector] as Source multiplies it

  static int64_t scratch_size(const AttentionParams& p) { return R * p.head_dim + 2 * kBlockN * kWidth + kWidth; }

  INLINE Decoder(const QueryBlock& of, Real* scratch)
      : block(of), p(of.p), shifted(PairOptions<1>::given(of.p)), step(shifted ? kWidth : R), q(scratch) {
    scores = q + R * p.head_dim, shift = scores + kBlockN * kWidth;
    for (int r = 0; r < R; ++r) {
      const char* const row = block.rows.row(p.q, r);
      for (int64_t d = 0, at = 0; d < p.head_dim; d += Source::kDims, at += kWidth) {
        const Vec x = row ? Source::load_factors(row, d) : Vec{};
        store(q + r * p.head_dim + at, Source::kPairs ? x : x * base2_scale(p));
      }
    }
  }

  void attend(Interval keys, DecodePart part) const {
    IntVec query[1];
    for (int lane = 0; lane < kWidth; ++lane) query[0][lane] = block.rows.query[lane];
    const PairOptions<1> options(p, block.rows, block.visible);
    std::memset(part.out, 0, size_t(R * p.head_dim_v) * sizeof(Real));
    OnlineSoftmax<1> softmax;
    softmax.start();
    Rows at;
    for (int64_t start_n = keys.lo / kBlockN * kBlockN; start_n < keys.hi; start_n += kBlockN) {
      const Interval range = keys.intersect({start_n, start_n + kBlockN});
      KeyTile<1> tile(p, block.k, block.v, block.visible, block.queries, query, range);
      const Shown shown = shifted ? options.load_shift(range, tile.mask, shift) : Shown::kAll;
      if (shown == Shown::kNone) continue;
      at.find(block, range);
      score(at, tile.keys);
      Vec tile_max[1];
      if (shifted) {
        spread(tile.keys);
        options.apply(scores, shift, tile.keys, tile_max);
      } else {
        tile_max[0] = hide_and_find_largest(tile);
      }
      softmax.update(scores, shifted ? tile.keys : blocks_of(kWidth, tile.keys * R), tile_max);
      if (p.dropout_seed)
        for_kept<1>(p, block.rows, range, [&](int64_t j, int, IntVec kept) INLINE_LAMBDA {
          store(scores + j * kWidth, kept ? load(scores + j * kWidth) : Vec{});
        });
      const bool guarded = tile.hides_infinite(p, shown, [&](int64_t j) INLINE_LAMBDA { return at.v(j); });
      add_values(at, tile, guarded, softmax.rescale[0], part.out);
    }
    store(part.row_max, softmax.row_max[0]);
    store(part.row_sum,
          shifted ? softmax.row_sum[0] : over_rows(softmax.row_sum[0], [](Real a, Real b) { return a + b; }));
  }

 private:
  // scores without a gap, R for each key: some keys at a time, whose products with all rows fill a vector.
  void score(const Rows& at, int64_t keys) const {
    constexpr int kKeys = kWidth / R;
    for (int64_t j = 0; j < keys; j += kKeys) {
      const int64_t count = smaller(kKeys, keys - j);
      for (int64_t i = j; i < j + count; ++i) {
        prefetch(at.v(i), 1, 0, p.head_dim_v * Source::kBytes);
        prefetch(at.k(i + kRowsAhead), 1, 0, p.head_dim * Source::kBytes);
      }
      Vec products[kWidth];
      repeat<kKeys>(EACH(i) {
        // Past the last key its own row again: nobody looks at the result.
        const char* const row = at.k(j + smaller(i, count - 1));
        Vec sums[R] = {};
        for (int64_t d = 0, at = 0; d < p.head_dim; d += Source::kDims, at += kWidth) {
          const Vec k = Source::load_factors(row, d);
          repeat<R>(EACH(r) { sums[r] = Source::multiply_add(load(q + r * p.head_dim + at), k, sums[r]); });
        }
        repeat<R>(EACH(r) { products[i * R + r] = sums[r]; });
      });
      Vec x = sum_each(products);
      if constexpr (Source::kPairs) x *= base2_scale(p);
      store(scores + j * R, x);
    }
  }

  // For options, which want a vector for each key: [key][row] -> [key][lane], the last first.
  void spread(int64_t keys) const {
    for (int64_t j = keys - 1; j >= 0; --j)
      for (int r = R - 1; r >= 0; --r) scores[j * kWidth + r] = scores[j * R + r];
  }

  // The largest score of each row, in all lanes that its scores come to lie in.
  Vec hide_and_find_largest(const KeyTile<1>& tile) const {
    const int64_t count = tile.keys * R;
    for (int64_t at = count; at % kWidth != 0; ++at) scores[at] = -kInfinity;
    for (int64_t j = 0; j < tile.keys; ++j)
      if (!tile.common.contains({j, j + 1}))
        for (int r = 0; r < R; ++r)
          if (!tile.mask.sees(Int(j), 0)[r]) scores[j * R + r] = -kInfinity;
    Vec largest = broadcast(-kInfinity);
    for (int64_t at = 0; at < count; at += kWidth) largest = larger(largest, load(scores + at));
    return over_rows(largest, [](Real a, Real b) { return a < b ? b : a; });
  }

  // Lane i and all those R apart from it, joined.
  template <class F>
  static Vec over_rows(Vec x, F&& join) {
    for (int r = 0; r < R; ++r) {
      Real all = x[r];
      for (int i = r + R; i < kWidth; i += R) all = join(all, x[i]);
      for (int i = r; i < kWidth; i += R) x[i] = all;
    }
    return x;
  }

  void add_values(const Rows& at, const KeyTile<1>& tile, bool guarded, Vec rescale, Real* out) const {
    constexpr int kVectors = R <= 2 ? 8 : R <= 4 ? 4 : 2;
    for_vector_tiles<kVectors>(0, p.head_dim_v / kWidth, [&](auto width, int64_t n) INLINE_LAMBDA {
      Tile<R, width> x;
      x.map([&](Vec, auto r, auto c)
                INLINE_LAMBDA { return load(out + r * p.head_dim_v + (n + c) * kWidth) * rescale[int(r)]; });
      const auto add_key = [&](int64_t j, auto&& takes) INLINE_LAMBDA {
        const char* const row = at.v(j);
        Vec v[decltype(width)::value];
        repeat<width>(EACH(c) { v[c] = Source::load_reals(row, (n + c) * kWidth); });
        repeat<R>(EACH(r) {
          if (!takes(r)) return;
          const Vec weight = broadcast_from(scores + j * step + r);
          repeat<width>(EACH(c) { x.at[r][c] = fused(weight, v[c], x.at[r][c]); });
        });
      };
      if (guarded)
        for (int64_t j = 0; j < tile.keys; ++j) add_key(j, [&](int r) { return sees(tile, j, r); });
      else
        for (int64_t j = 0; j < tile.keys; ++j) add_key(j, [](int) { return true; });
      x.map([&](Vec x, auto r, auto c)
                INLINE_LAMBDA { return store(out + r * p.head_dim_v + (n + c) * kWidth, x), x; });
    });
  }

  bool sees(const KeyTile<1>& tile, int64_t j, int r) const {
    return shifted ? shift[j * kWidth + r] != -kInfinity : tile.mask.sees(Int(j), 0)[r] != 0;
  }
};

// out and lse from the parts of all ranges, in the order of the keys.
void merge_parts(const QueryBlock& block, Real* parts, int64_t ranges, int64_t size) {
  const AttentionParams& p = block.p;
  const int64_t row = p.head_dim_v;
  OnlineSoftmax<1> softmax;
  p.sinks ? softmax.start_with(static_cast<const Real*>(p.sinks), block.rows) : softmax.start();
  const DecodePart total(parts);
  for (int64_t n = 0; n < ranges; ++n) {
    const DecodePart part(parts + n * size);
    const Vec row_max = load(part.row_max), highest = larger(softmax.row_max[0], row_max);
    const Vec pivot = highest == -kInfinity ? Vec{} : highest;
    const Vec before = exp2(softmax.row_max[0] - pivot), here = exp2(row_max - pivot);
    softmax.row_sum[0] = fused(softmax.row_sum[0], before, load(part.row_sum) * here);
    softmax.row_max[0] = highest;
    for (int r = 0; r < block.rows.count; ++r)
      for (int64_t d = r * row; d < (r + 1) * row; d += kWidth) {
        const Vec x = load(part.out + d) * here[r];
        store(total.out + d, n == 0 ? x : fused(load(total.out + d), broadcast(before[r]), x));
      }
  }
  Vec factor[1], lse[1];
  softmax.finish(factor, lse);
  if (p.dropout_seed) factor[0] *= Real(p.dropout_scale);
  for (int r = 0; r < block.rows.count; ++r)
    for (int64_t d = 0; d < p.head_dim_v; d += kWidth)
      store_elements(p.out.element, block.rows.row(p.out, r) + d * p.out.dim, p.out.dim, p.head_dim_v - d,
                     load(total.out + r * row + d) * factor[0][r]);
  block.store_lse(reinterpret_cast<const Real*>(lse));
}

template <class Source, class Rows, int R>
void decode_rows(const AttentionParams& p, int threads) {
  static thread_local Arena results;
  const int64_t ranges = std::max<int64_t>(1, blocks_of(kDecodeKeys, p.seqlen_k));
  const int64_t heads = p.batch * p.kv_heads, size = DecodePart::size_of(p, R);
  // One head after another where they are alone on their thread, so that few parts wait to be merged.
  Real* const parts = results.array<Real>(size_t((threads > 1 ? heads : 1) * ranges * size));
  const auto block_of = [&](int64_t head) {
    return QueryBlock::at(p, member_of(p, head / p.kv_heads), head % p.kv_heads, 0);
  };
  const auto attend = [&](int64_t head, int64_t n, Real* part) {
    static thread_local Arena arena;
    const QueryBlock block = block_of(head);
    const Interval keys = block.visible.keys_of_any(block.queries).intersect({n * kDecodeKeys, (n + 1) * kDecodeKeys});
    Decoder<Source, Rows, R>(block, arena.array<Real>(size_t(Decoder<Source, Rows, R>::scratch_size(p))))
        .attend(keys, DecodePart(part));
  };
  if (threads > 1) {
    parallel_for(heads * ranges, threads,
                 [&](int64_t task) { attend(task / ranges, task % ranges, parts + task * size); });
    parallel_for(heads, threads,
                 [&](int64_t head) { merge_parts(block_of(head), parts + head * ranges * size, ranges, size); });
  } else {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t n = 0; n < ranges; ++n) attend(head, n, parts + n * size);
      merge_parts(block_of(head), parts, ranges, size);
    }
  }
  results.trim();
}

template <class Source, class Rows>
void decode_from(const AttentionParams& p, int threads) {
  const int64_t rows = p.heads / p.kv_heads * p.seqlen_q;
  if (rows == 1) return decode_rows<Source, Rows, 1>(p, threads);
  if (rows == 2) return decode_rows<Source, Rows, 2>(p, threads);
  if constexpr (kDecodeRows >= 4)
    if (rows <= 4) return decode_rows<Source, Rows, 4>(p, threads);
  if constexpr (kDecodeRows >= 8) return decode_rows<Source, Rows, 8>(p, threads);
}

template <class Source>
void decode_with(const AttentionParams& p, int threads) {
  p.page_table ? decode_from<Source, PagedRows>(p, threads) : decode_from<Source, DenseRows>(p, threads);
}

// Whether the queries are few, and rows of k and v dense and of whole vectors.
bool suits_decoding(const AttentionParams& p) {
  const int64_t bytes = bytes_of(p.q.element);
  return !p.cu_seqlens_q && p.heads / p.kv_heads * p.seqlen_q <= kDecodeRows && p.q.dim == bytes && p.k.dim == bytes &&
         p.v.dim == bytes && p.head_dim % kWidth == 0 && p.head_dim_v % kWidth == 0;
}

void decode(const AttentionParams& p, int threads) {
  if (is_small(2.0 * double(p.batch * p.heads * p.seqlen_q) * double(p.seqlen_k) * double(p.head_dim + p.head_dim_v)))
    threads = 1;
  if (p.q.element == kReal) return decode_with<RowsOf<kReal>>(p, threads);
#if !defined(REAL_IS_DOUBLE)
  if (p.q.element == Element::kFloat16) return decode_with<RowsOf<Element::kFloat16>>(p, threads);
#if defined(ISA_BF16)
  if (p.head_dim % RowsOfPairs::kDims == 0) return decode_with<RowsOfPairs>(p, threads);
#endif
  decode_with<RowsOf<Element::kBFloat16>>(p, threads);
#endif
}

// Attention to keys in pages, where the call suits decoding: whether it was computed.
bool decode_pages(const AttentionParams& p, int threads) {
  const bool suits = suits_decoding(p);
  if (suits && p.batch && p.seqlen_q) decode(p, threads);
  return suits;
}
