// Linear layers and their gradients, one product of matrices of any strides, with what follows it done in the cache:
//
//   out[m, n] = act(sum_k a[m, k] b[k, n] + bias[n]) + residual[m, n]
//
// b is packed into panels as wide as a tile. One running sum over all of k would gather ten times the rounding errors,
// so a sum is of chains of k: they, and so the bits, depend on the shape alone.

constexpr int64_t kCacheLine = 16;      // floats
constexpr int64_t kChain = 256;         // steps of one running sum
constexpr int64_t kProductSteps = 512;  // of a block of k
constexpr int64_t kProductPanels = 8;   // packed together: half a megabyte, which stays in the second cache
constexpr int64_t kPackedRows = 64;     // of a, where its steps lie apart
constexpr int64_t kPackedSize = kPackedRows * (kProductSteps + kCacheLine);
constexpr int64_t kAhead = 24;  // steps that are fetched before they are packed

// N vectors of the product's columns for each panel. Gated, the first vector is of the gate, the second of the value.
template <int N>
struct Panels {
  const ProductParams& p;

  INLINE int64_t out_columns() const { return p.gated ? p.columns / 2 : p.columns; }
  INLINE int64_t out_width() const { return p.gated ? kWidth : N * kWidth; }
  INLINE int64_t count() const { return blocks_of(out_width(), out_columns()); }

  // Of vector n: its first column, and how many of its lanes are columns.
  INLINE int64_t column(int64_t panel, int n) const {
    return p.gated ? n * out_columns() + panel * kWidth : (panel * N + n) * kWidth;
  }
  INLINE bool whole(int64_t panel) const { return (panel + 1) * out_width() <= out_columns(); }
  INLINE int64_t lanes(int64_t panel, int n) const {
    return smaller(out_columns() - (p.gated ? panel : panel * N + n) * kWidth, int64_t{kWidth});
  }
};

// to[k][lane] = b[k][lane], 0 past the last column; the next k is `stride` further on.
INLINE void pack_columns(float* to, int64_t stride, Matrix b, int64_t steps, int64_t lanes) {
  if (b.column == 1 || b.row != 1) {
    for (int64_t k = 0; k < steps; ++k) store(to + k * stride, load_some(b.at(k, 0), b.column, lanes));
    return;
  }
  for (int64_t k = 0; k < steps; k += kWidth) {
    Vec rows[kWidth];
    for (int i = 0; i < kWidth; ++i) rows[i] = i < lanes ? load_some(b.at(k, i), 1, steps - k) : Vec{};
    transpose(rows);
    for (int i = 0; i < kWidth && k + i < steps; ++i) store(to + (k + i) * stride, rows[i]);
  }
}

// A block of rows and panels of one product, k block after k block.
template <int N>
struct ProductBlock {
  const ProductParams& p;
  Panels<N> panels;
  Interval rows, columns;  // columns in panels
  float *packed_a, *packed_b;

  void run() const {
    for (int64_t k = 0; k == 0 || k < p.steps; k += kProductSteps) add_steps(k, smaller(kProductSteps, p.steps - k));
  }

 private:
  void add_steps(int64_t k, int64_t steps) const {
    for (int64_t panel = columns.lo; panel < columns.hi; ++panel)
      for (int n = 0; n < N; ++n) {
        const Matrix part{p.b.at(k, panels.column(panel, n)), p.b.row, p.b.column};
        pack_columns(panel_of(panel) + n * kWidth, N * kWidth, part, steps, panels.lanes(panel, n));
      }
    for (int64_t m = rows.lo; m < rows.hi; m += kPackedRows) add_rows({m, smaller(m + kPackedRows, rows.hi)}, k, steps);
  }

  void add_rows(Interval some, int64_t k, int64_t steps) const {
    const bool packed = p.a.column != 1;
    if (packed) pack_rows(some, k, steps);
    for_row_tiles(some.lo, some.hi, [&](auto height, int64_t m) INLINE_LAMBDA {
      const Broadcast a = packed ? Broadcast{packed_rows(some, m), 1, height} : Broadcast{p.a.at(m, k), p.a.row, 1};
      for (int64_t panel = columns.lo; panel < columns.hi; ++panel) {
        prefetch_out<height>(m, panel);
        alignas(64) float sums[height][N * kWidth];
        for (int64_t s = 0; s == 0 || s < steps; s += kChain) {
          Tile<height, N> tile;
          tile.clear();
          tile.multiply_add({a.data + s * a.step, a.row, a.step}, panel_of(panel) + s * N * kWidth, N * kWidth,
                            smaller(kChain, steps - s));
          tile.map([&](Vec x, auto i, auto n) INLINE_LAMBDA {
            float* to = sums[i] + n * kWidth;
            store(to, s == 0 ? x : load(to) + x);
            return x;
          });
        }
        finish(sums, m, panel, k);
      }
    });
  }

  float* panel_of(int64_t panel) const { return packed_b + (panel - columns.lo) * kProductSteps * N * kWidth; }

  // The rows of the result come into the cache while their sums are made.
  template <int M>
  INLINE void prefetch_out(int64_t m, int64_t panel) const {
    for (int i = 0; i < M; ++i)
      for (int n = 0; n < (p.gated ? 1 : N); ++n) __builtin_prefetch(p.out.at(m + i, panels.column(panel, n)), 1);
  }

  // Rows whose steps lie apart are copied, once for all panels, tile by tile.
  void pack_rows(Interval some, int64_t k, int64_t steps) const {
    for (int64_t s = 0; s < steps; ++s) {
      // No hardware sees a pattern in steps of pages.
      for (int64_t m = some.lo; m < some.hi; m += kCacheLine) __builtin_prefetch(p.a.at(m, k + s + kAhead));
      for_row_tiles(some.lo, some.hi, [&](auto height, int64_t m) INLINE_LAMBDA {
        const float* from = p.a.at(m, k + s);
        float* to = packed_rows(some, m) + s * height;
        if (p.a.row == 1)
          std::memcpy(to, from, height * sizeof(float));
        else
          for (int i = 0; i < height; ++i) to[i] = from[i * p.a.row];
      });
    }
  }

  // A line more than they need lies between tiles, which would else fall into the same sets of the cache.
  float* packed_rows(Interval some, int64_t m) const {
    return packed_a + (m - some.lo) * kProductSteps + (m - some.lo) / kTileRows * kCacheLine;
  }

  // What happens to a tile once its sums over a block of k are there.
  template <int M>
  void finish(const float (&tile)[M][N * kWidth], int64_t m, int64_t panel, int64_t k) const {
    if (panels.whole(panel))
      finish(tile, m, panel, k, [](int) INLINE_LAMBDA { return AllLanes{}; });
    else
      finish(tile, m, panel, k, [&](int n) INLINE_LAMBDA { return FirstLanes{panels.lanes(panel, n)}; });
  }

  template <int M, class F>
  INLINE void finish(const float (&tile)[M][N * kWidth], int64_t m, int64_t panel, int64_t k, F&& lanes) const {
    const bool last = k + kProductSteps >= p.steps;
    const Matrix kept = p.sums ? p.sums : last ? Matrix{} : p.out;
    // The sum over all k so far, with the bias in the end.
    const auto sum = [&](int i, int n) INLINE_LAMBDA {
      const int64_t column = panels.column(panel, n);
      const auto some = lanes(n);
      Vec x = load(tile[i] + n * kWidth);
      if (k > 0) x += some.load_from((p.sums ? p.sums : p.out).at(m + i, column));
      if (last && p.bias) x += some.load_from(p.bias + column);
      if (kept) some.store_to(kept.at(m + i, column), x);
      return x;
    };
    const auto store_out = [&](int i, int n, Vec x) INLINE_LAMBDA {
      const int64_t column = panels.column(panel, n);
      const auto some = lanes(n);
      if (p.residual) x += some.load_from(p.residual.at(m + i, column));
      some.store_to(p.out.at(m + i, column), x);
    };
    if (!last) {
      for (int i = 0; i < M; ++i)
        for (int n = 0; n < N; ++n) sum(i, n);
      return;
    }
    with_activation(p.activation, [&](auto activation) INLINE_LAMBDA {
      for (int i = 0; i < M; ++i) {
        if (p.gated) {
          const Vec gate = sum(i, 0), value = sum(i, 1);
          store_out(i, 0, activation.value(gate) * value);
        } else {
          for (int n = 0; n < N; ++n) store_out(i, n, activation.value(sum(i, n)));
        }
      }
    });
  }
};

template <int N>
void multiply(const ProductParams& p, int threads) {
  const Panels<N> panels{p};
  const int64_t across = blocks_of(kProductPanels, panels.count());
  // More blocks of rows for more threads: each packs its own panels, and no sum depends on where a block ends.
  const int64_t down = threads == 1 ? 1 : blocks_of(across, 4 * threads);
  const int64_t height = ::larger(blocks_of(down, p.rows), int64_t{64});
  const int64_t tasks = blocks_of(height, p.rows) * across;
  parallel_for(tasks, threads, [&](int64_t task) {
    static thread_local Arena arena;
    float* scratch = arena.floats(size_t(kProductSteps * kProductPanels * N * kWidth + kPackedSize));
    const int64_t m = task / across * height, panel = task % across * kProductPanels;
    ProductBlock<N>{p,
                    panels,
                    {m, smaller(m + height, p.rows)},
                    {panel, smaller(panel + kProductPanels, panels.count())},
                    scratch + kProductSteps * kProductPanels * N * kWidth,
                    scratch}
        .run();
  });
}

void product(const ProductParams& p, int threads) {
  if (p.rows == 0 || p.columns == 0) return;
  threads = is_small(2.0 * p.rows * p.columns * p.steps) ? 1 : threads;
  if (p.gated)
    multiply<2>(p, threads);
  else
    multiply<kTileVectors>(p, threads);
}
