// Visibility on vectors: lane i of a block of queries sees those of a tile's keys [lo[i], hi[i]) that its mask shows.

constexpr int kBlockN = 128;  // keys of a tile
constexpr int kWordBits = 8 * sizeof(Bits);

// What a tile of pairs shows.
enum class Shown { kNone, kSome, kAll };

template <int N>
struct LaneMask {
  IntVec lo[N], hi[N];                 // counted from the tile's first key
  const BitVec (*shown)[N] = nullptr;  // by a mask: bit b of shown[w] is that of key w * kWordBits + b

  // `query` counts from first_query, lane by lane.
  INLINE LaneMask(const Visibility& rows, int64_t first_query, const IntVec (&query)[N], int64_t first_key) {
    constexpr int64_t kBeyond = 1 << 24;  // past any tile, and far from the limits of int32
    const auto relative = [&](int64_t key) { return Int(clamp(key - first_key, -kBeyond, kBeyond)); };
    const IntVec start = broadcast(relative(rows.start)), end = broadcast(relative(rows.end));
    const IntVec first = broadcast(relative(first_query + rows.first));
    const IntVec last = broadcast(relative(first_query + rows.last));
    for (int n = 0; n < N; ++n) {
      const IntVec from = query[n] + first, to = query[n] + last + 1;
      lo[n] = from > start ? from : start;
      hi[n] = to < end ? to : end;
    }
  }

  INLINE void hide_lanes_from(int count) {
    for (int lane = count; lane < N * kWidth; ++lane)
      hi[lane / kWidth][lane % kWidth] = lo[lane / kWidth][lane % kWidth];
  }

  // Whether every lane sees the first `keys` keys.
  INLINE bool sees_all(Int keys) const {
    if (shown) return false;
    IntVec all = ~IntVec{};
    for (int n = 0; n < N; ++n) all &= (lo[n] <= Int(0)) & (hi[n] >= keys);
    bool result = true;
    for (int i = 0; i < kWidth; ++i) result &= all[i] != 0;
    return result;
  }

  INLINE IntVec sees(Int key, int n) const {
    const IntVec inside = (lo[n] <= key) & (hi[n] > key);
    if (!shown) return inside;
    return inside & (IntVec)((shown[key / kWordBits][n] & Bits(1) << key % kWordBits) != Bits(0));
  }
};
