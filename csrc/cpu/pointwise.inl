// What a layer does element by element: activations, gated or not, with their gradients; sums over rows.
//
//   out = act(gate),         dgate = dout act'(gate)
//   out = act(gate) value,   dgate = dout value act'(gate),  dvalue = dout act(gate)

constexpr int64_t kElements = 16384;  // of a task

// Calls f(row) for every row, a task at a time.
template <class F>
void for_rows(int64_t rows, int64_t width, double flops, int threads, F&& f) {
  const int64_t height = ::larger(kElements / ::larger(width, int64_t{1}), int64_t{1});
  parallel_for(blocks_of(height, rows), is_small(flops * rows * width) ? 1 : threads, [&](int64_t task) {
    for (int64_t m = task * height; m < smaller((task + 1) * height, rows); ++m) f(m);
  });
}

void activate(const ActivationParams& p, int threads) {
  with_activation(p.activation, [&](auto activation) {
    for_rows(p.rows, p.width, 30.0, threads, [&](int64_t m) {
      const float *gate = p.gate.at(m, 0), *value = p.value ? p.value.at(m, 0) : nullptr;
      float* out = p.out.at(m, 0);
      for_vectors(p.width, [&](int64_t c, auto lanes) INLINE_LAMBDA {
        const Vec x = activation.value(lanes.load_from(gate + c));
        lanes.store_to(out + c, value ? x * lanes.load_from(value + c) : x);
      });
    });
  });
}

void activate_backward(const ActivationParams& p, int threads) {
  with_activation(p.activation, [&](auto activation) {
    for_rows(p.rows, p.width, 60.0, threads, [&](int64_t m) {
      const float *dout = p.dout.at(m, 0), *gate = p.gate.at(m, 0), *value = p.value ? p.value.at(m, 0) : nullptr;
      float *dgate = p.dgate.at(m, 0), *dvalue = p.dvalue ? p.dvalue.at(m, 0) : nullptr;
      for_vectors(p.width, [&](int64_t c, auto lanes) INLINE_LAMBDA {
        const Vec x = lanes.load_from(gate + c), gradient = lanes.load_from(dout + c);
        const Vec slope = gradient * activation.slope(x);
        lanes.store_to(dgate + c, value ? slope * lanes.load_from(value + c) : slope);
        if (value) lanes.store_to(dvalue + c, gradient * activation.value(x));
      });
    });
  });
}

// out[n] = sum of x[m, n] over m: sums of blocks of rows are added up, in an order that the shape gives.
void sum_rows(Matrix x, float* out, int64_t rows, int64_t width, int threads) {
  constexpr int64_t kBlock = 128, kAcross = 8 * kWidth;
  parallel_for(blocks_of(kAcross, width), is_small(8.0 * rows * width) ? 1 : threads, [&](int64_t task) {
    const int64_t first = task * kAcross, columns = smaller(kAcross, width - first);
    alignas(64) float sums[kAcross] = {};
    for (int64_t top = 0; top < rows; top += kBlock) {
      alignas(64) float part[kAcross] = {};
      for (int64_t m = top; m < smaller(top + kBlock, rows); ++m) {
        const float* row = x.at(m, first);
        for_vectors(columns, [&](int64_t c, auto lanes)
                                 INLINE_LAMBDA { store(part + c, load(part + c) + lanes.load_from(row + c)); });
      }
      for_vectors(kAcross, [&](int64_t c, auto) INLINE_LAMBDA { store(sums + c, load(sums + c) + load(part + c)); });
    }
    for_vectors(columns, [&](int64_t c, auto lanes) INLINE_LAMBDA { lanes.store_to(out + first + c, load(sums + c)); });
  });
}
