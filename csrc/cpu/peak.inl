// The limit that a product comes up against, for benchmarks: multiply-adds of registers and nothing else.
//
//   x = x / 2 + 1 / 2, again and again in each accumulator of a tile

// How many operations that were.
double multiply_adds(int64_t steps) {
  volatile Real half = Real(0.5);  // or the compiler would know what becomes of x
  const Vec factor = broadcast(half);
  Tile<kTileRows, kTileVectors> x;
  x.map([&](Vec, auto, auto) INLINE_LAMBDA { return broadcast(half); });
  for (int64_t i = 0; i < steps; ++i) x.map([&](Vec x, auto, auto) INLINE_LAMBDA { return fused(x, factor, factor); });
  x.map([&](Vec x, auto, auto) INLINE_LAMBDA { return half = x[0], x; });
  return 2.0 * kTileRows * kLanes * double(steps);
}
