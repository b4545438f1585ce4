// Online softmax in base 2, one lane a row: start, update tile by tile, finish.
//
//   row_max' = max(row_max, max(s))    rescale = 2^(row_max - row_max')    row_sum' = rescale row_sum + sum 2^(s -
//   row_max')

template <int N>
struct OnlineSoftmax {
  Vec row_max[N], row_sum[N];
  Vec pivot[N], rescale[N];  // of the current tile

  INLINE void start() {
    for (int n = 0; n < N; ++n) row_max[n] = broadcast(-kInfinity), row_sum[n] = Vec{};
  }

  // A sink is one more logit, of no key.
  INLINE void start_with(const Real* sinks, const LaneRows& rows) {
    start();
    for (int lane = 0; lane < rows.count; ++lane) {
      const Real natural = sinks[rows.head_of(lane)];
      const Real sink = natural - natural == 0 ? finite(double(natural) * kLog2EOf64) : natural;
      row_max[lane / kWidth][lane % kWidth] = sink;
      row_sum[lane / kWidth][lane % kWidth] = sink == -kInfinity ? 0 : 1;
    }
  }

  // scores -> p, in place
  template <Vec (*kPower)(Vec) = exp2>
  INLINE void update(Real* scores, int64_t keys, const Vec (&tile_max)[N]) {
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
        const Vec p = kPower(load(scores + n * kWidth) - pivot[n]);
        tile_sum[n] += p;
        store(scores + n * kWidth, p);
      });
    repeat<N>(EACH(n) { row_sum[n] = fused(row_sum[n], rescale[n], tile_sum[n]); });
  }

  // What out' is multiplied with, and lse.
  INLINE void finish(Vec (&factor)[N], Vec (&lse)[N]) const {
    repeat<N>(EACH(n) {
      const auto empty = row_sum[n] == Real(0);
      factor[n] = Real(1) / (empty ? broadcast(Real(1)) : row_sum[n]);
      lse[n] = fused(row_max[n], broadcast(kLn2), fused(row_max[n], broadcast(kLn2Rest), log(row_sum[n])));
      lse[n] = empty ? broadcast(-kInfinity) : lse[n];
    });
  }
};
