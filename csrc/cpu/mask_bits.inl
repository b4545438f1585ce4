// A mask as bits, a word of successive keys for each lane: no row of it is transposed, and seeing a key is the test of
// a bit.
//
//   bit b of words[w][lane] = mask[lane's row, w * kWordBits + b] != 0

template <int N>
struct MaskBits {
  BitVec words[kBlockN / kWordBits][N];

  // The bits of some keys, and what they show; lanes past the last row have none.
  INLINE Shown load(const View& mask, const LaneRows& rows, Interval keys) {
    const int64_t count = mask.dim == 0 ? 1 : keys.hi - keys.lo;
    uint8_t bits[kBlockN / 8], any[kBlockN / 8] = {}, all[kBlockN / 8];
    std::memset(all, 0xff, sizeof(all));
    std::memset(words, 0, sizeof(words));
    const char* before = nullptr;
    for (int lane = 0; lane < rows.count; ++lane) {
      const char* const row = rows.row(mask, lane) + keys.lo * mask.dim;
      if (row != before) {
        load_row(bits, row, mask.dim, count);
        for (int i = 0; i < kBlockN / 8; ++i) any[i] |= bits[i], all[i] &= bits[i];
      }
      before = row;
      for (int w = 0; w < kBlockN / kWordBits; ++w) {
        Bits word;
        std::memcpy(&word, bits + w * sizeof(Bits), sizeof(Bits));
        words[w][lane / kWidth][lane % kWidth] = word;
      }
    }
    bool some = false, complete = true;
    for (int64_t i = 0; i < count; ++i) {
      const int bit = 1 << i % 8;
      some |= (any[i / 8] & bit) != 0, complete &= (all[i / 8] & bit) != 0;
    }
    return complete ? Shown::kAll : some ? Shown::kSome : Shown::kNone;
  }

 private:
  typedef uint8_t RowVec __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t PackedVec __attribute__((vector_size(kVectorBytes / 8)));

  // A row of kBlockN bits, of which those of `count` keys matter.
  static INLINE void load_row(uint8_t* bits, const char* row, int64_t stride, int64_t count) {
    if (stride == 0) return void(std::memset(bits, *row != 0 ? 0xff : 0, kBlockN / 8));
    uint8_t gathered[kBlockN] = {};
    if (stride != 1 || count < kBlockN) {
      for (int64_t j = 0; j < count; ++j) gathered[j] = uint8_t(row[j * stride]);
      row = reinterpret_cast<const char*>(gathered);
    }
    for (int64_t j = 0; j < kBlockN; j += kVectorBytes) {
      // Byte i of each eight keeps bit i, and the eight are joined in the lowest.
      WideVec x = (WideVec)((read<RowVec>(row + j) != 0)) & 0x8040201008040201u;
      x |= x >> 32, x |= x >> 16, x |= x >> 8;
      const PackedVec packed = __builtin_convertvector(x, PackedVec);
      std::memcpy(bits + j / 8, &packed, sizeof(packed));
    }
  }
};
