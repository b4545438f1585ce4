// Add and normalise, forward and backward: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019) of
//
//   summed = x + residual,  normal = (summed - mean) rstd,  out = normal weight + bias
//   slope = dout weight,  dx = rstd (slope - normal mean(slope normal) - mean(slope)) + dsummed
//   dweight = sum of dout normal,  dbias = sum of dout over the rows
//
// RMSNorm is the same with a mean of 0 and without the last mean of dx. The sums over rows are of parts of fixed size.

constexpr int64_t kPartRows = 64;

// A weight or bias, or what stands for one that is not given.
struct Parameter {
  const float* data;
  float otherwise;

  template <class L>
  INLINE Vec at(int64_t c, L lanes) const {
    return data ? lanes.load_from(data + c) : broadcast(otherwise);
  }
};

INLINE void normalise_row(const NormParams& p, int64_t m) {
  const float width = float(p.width), *x = p.x.at(m, 0), *summed = x;
  float sum[1], squares[1];
  if (p.residual) {
    const float* residual = p.residual.at(m, 0);
    float* to = p.summed.at(m, 0);
    summed = to;
    sum_row(p.width, sum, [&](int64_t c, auto lanes, Vec* sums) INLINE_LAMBDA {
      const Vec both = lanes.load_from(x + c) + lanes.load_from(residual + c);
      lanes.store_to(to + c, both);
      sums[0] += both;
    });
  } else {
    sum_row(p.width, sum, [&](int64_t c, auto lanes, Vec* sums) INLINE_LAMBDA { sums[0] += lanes.load_from(x + c); });
  }
  const float mean = p.mean ? sum[0] / width : 0.0f;
  sum_row(p.width, squares, [&](int64_t c, auto lanes, Vec* sums) INLINE_LAMBDA {
    const Vec deviation = lanes.only(lanes.load_from(summed + c) - mean);
    sums[0] = fused(deviation, deviation, sums[0]);
  });
  const float rstd = 1.0f / std::sqrt(squares[0] / width + p.eps);
  if (p.mean) p.mean[m] = mean;
  p.rstd[m] = rstd;
  const Parameter weight{p.weight, 1.0f}, bias{p.bias, 0.0f};
  float* out = p.out.at(m, 0);
  for_vectors(p.width, [&](int64_t c, auto lanes) INLINE_LAMBDA {
    const Vec normal = (lanes.load_from(summed + c) - mean) * rstd;
    lanes.store_to(out + c, fused(normal, weight.at(c, lanes), bias.at(c, lanes)));
  });
}

void add_norm(const NormParams& p, int threads) {
  if (p.width == 0) return;
  const int64_t parts = blocks_of(kPartRows, p.rows);
  parallel_for(parts, is_small(16.0 * p.rows * p.width) ? 1 : threads, [&](int64_t part) {
    for (int64_t m = part * kPartRows; m < smaller((part + 1) * kPartRows, p.rows); ++m) normalise_row(p, m);
  });
}

INLINE void differentiate_norm_row(const NormParams& p, int64_t m, float* dweight, float* dbias) {
  const float *summed = p.summed.at(m, 0), *dout = p.dout.at(m, 0), *dsummed = p.dsummed ? p.dsummed.at(m, 0) : nullptr;
  const float mean = p.mean ? p.mean[m] : 0.0f, rstd = p.rstd[m], width = float(p.width);
  const Parameter weight{p.weight, 1.0f};
  float sums[2];
  sum_row(p.width, sums, [&](int64_t c, auto lanes, Vec* share) INLINE_LAMBDA {
    const Vec normal = (lanes.load_from(summed + c) - mean) * rstd;
    const Vec slope = lanes.load_from(dout + c) * weight.at(c, lanes);
    share[0] = fused(slope, normal, share[0]);
    share[1] += slope;
  });
  const float along = sums[0] / width, level = p.mean ? sums[1] / width : 0.0f;
  float* dx = p.dx.at(m, 0);
  for_vectors(p.width, [&](int64_t c, auto lanes) INLINE_LAMBDA {
    const Vec normal = (lanes.load_from(summed + c) - mean) * rstd, gradient = lanes.load_from(dout + c);
    Vec result = (gradient * weight.at(c, lanes) - normal * along - level) * rstd;
    if (dsummed) result += lanes.load_from(dsummed + c);
    lanes.store_to(dx + c, result);
    if (dweight) lanes.store_to(dweight + c, fused(gradient, normal, lanes.load_from(dweight + c)));
    if (dbias) lanes.store_to(dbias + c, lanes.load_from(dbias + c) + gradient);
  });
}

void add_norm_backward(const NormParams& p, int threads) {
  if (p.width == 0) return;
  const int64_t parts = blocks_of(kPartRows, p.rows);
  parallel_for(parts, is_small(32.0 * p.rows * p.width) ? 1 : threads, [&](int64_t part) {
    float *dweight = p.dweight ? p.dweight.at(part, 0) : nullptr, *dbias = p.dbias ? p.dbias.at(part, 0) : nullptr;
    for (float* sums : {dweight, dbias})
      if (sums) std::memset(sums, 0, size_t(p.width) * sizeof(float));
    for (int64_t m = part * kPartRows; m < smaller((part + 1) * kPartRows, p.rows); ++m)
      differentiate_norm_row(p, m, dweight, dbias);
  });
}
