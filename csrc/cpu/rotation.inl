// Rotary position embedding (Su et al. 2021): each pair of a row's elements turns by an angle of its position.
//
//   out_a = x_a cos - x_b sin,  out_b = x_b cos + x_a sin
//
// Pair i is (x_i, x_{i + pairs}), or (x_{2i}, x_{2i + 1}) if interleaved. What lies past the pairs is copied.

INLINE void rotate_row(const RotationParams& p, const float* x, float* out, const float* cos, const float* sin) {
  const int64_t step = p.interleaved ? 2 : 1, apart = p.interleaved ? 1 : p.pairs;
  const Vec direction = broadcast(p.inverse ? -1.0f : 1.0f);
  for (int64_t i = 0; i < p.pairs; i += kWidth) {
    const int64_t n = p.pairs - i, a = i * step, b = a + apart;
    const Vec c = load_some(cos + i * p.cos.dim, p.cos.dim, n);
    const Vec s = load_some(sin + i * p.sin.dim, p.sin.dim, n) * direction;
    const Vec x_a = load_some(x + a * p.x.dim, step * p.x.dim, n), x_b = load_some(x + b * p.x.dim, step * p.x.dim, n);
    store_some(out + a * p.out.dim, step * p.out.dim, n, x_a * c - x_b * s);
    store_some(out + b * p.out.dim, step * p.out.dim, n, x_b * c + x_a * s);
  }
  for (int64_t d = 2 * p.pairs; d < p.head_dim; ++d) out[d * p.out.dim] = x[d * p.x.dim];
}

void rotate(const RotationParams& p, int threads) {
  for_rows(p.batch * p.seqlen, p.heads * p.head_dim, 8.0, threads, [&](int64_t task) {
    const int64_t b = task / p.seqlen, i = task % p.seqlen;
    for (int64_t h = 0; h < p.heads; ++h) {
      const auto at = [&](const FloatView& view) { return view.head_of(b, h) + i * view.seq; };
      rotate_row(p, at(p.x), at(p.out), at(p.cos), at(p.sin));
    }
  });
}
