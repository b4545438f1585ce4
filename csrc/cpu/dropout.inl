// Random words of pairs, Philox 4x32-10: for dropout, a function of the indices alone.
//
//   word j mod 4 of philox(counter = (j div 4, i, batch * heads + head, offset), key = seed) keeps (i, j) where it
//   reaches p 2^32
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

// Ten rounds on the lower halves of 64-bit lanes; what the upper halves hold does not matter.
INLINE void philox(WideVec (&c)[4], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const WideVec a = multiply_halves(c[0], 0xd2511f53u), b = multiply_halves(c[2], 0xcd9e8d57u);
    c[0] = b >> 32 ^ c[1] ^ key0;
    c[1] = b;
    c[2] = a >> 32 ^ c[3] ^ key1;
    c[3] = a;
    key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
  }
}

// The words of four keys for a vector of queries.
INLINE void random_words(BitVec (&words)[4], uint32_t key, BitVec query, BitVec stream, const int64_t* seed) {
  constexpr uint64_t kLow = 0xffffffffu;
  const WideVec first = WideVec{} + uint64_t(key), last = WideVec{} + (uint64_t(seed[1]) & kLow);
  WideVec even[4] = {first, (WideVec)query & kLow, (WideVec)stream & kLow, last};
  philox(even, uint64_t(seed[0]));
  if constexpr (sizeof(Bits) == sizeof(uint64_t)) {
    for (int w = 0; w < 4; ++w) words[w] = (BitVec)(even[w] & kLow);
  } else {
    WideVec odd[4] = {first, (WideVec)query >> 32, (WideVec)stream >> 32, last};
    philox(odd, uint64_t(seed[0]));
    for (int w = 0; w < 4; ++w) words[w] = (BitVec)((even[w] & kLow) | odd[w] << 32);
  }
}

// f(key counted from the first one, vector, where the pair is kept) for every key and every vector of lanes.
template <int N, class F>
INLINE void for_kept(const AttentionParams& p, const LaneRows& rows, Interval keys, F&& f) {
  const Bits threshold = Bits(p.dropout_threshold);
  for (int n = 0; n < N; ++n) {
    BitVec query, stream;
    for (int i = 0; i < kWidth; ++i) {
      query[i] = uint32_t(rows.query_of(n * kWidth + i));
      stream[i] = uint32_t(rows.batch * p.heads + rows.head_of(n * kWidth + i));
    }
    for (int64_t j = keys.lo / 4 * 4; j < keys.hi; j += 4) {
      BitVec words[4];
      random_words(words, uint32_t(j / 4), query, stream, p.dropout_seed);
      for (int w = 0; w < 4; ++w)
        if (j + w >= keys.lo && j + w < keys.hi) f(j + w - keys.lo, n, (IntVec)(words[w] >= threshold));
    }
  }
}
