// Elements of any type as Reals, and back: rounded to the nearest, ties to even.

#if defined(REAL_IS_DOUBLE)
constexpr Element kReal = Element::kFloat64;
#else
constexpr Element kReal = Element::kFloat32;
#endif

// A half's exponent and mantissa in the places of a float's stand for a number 2^112 too small.
inline float from_half(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  uint32_t bits = magnitude;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // below 2^-14: the last place is 2^-24, as that of 0.5 as a float
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
INLINE T read(const char* from) {
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}

inline Real read_element(Element element, const char* from) {
  switch (element) {
    case Element::kFloat32:
      return Real(read<float>(from));
    case Element::kFloat64:
      return Real(read<double>(from));
    case Element::kBFloat16:
      return from_bfloat16(read<uint16_t>(from));
    case Element::kFloat16:
      return from_half(read<uint16_t>(from));
    case Element::kBool:
      return read<uint8_t>(from) != 0;
  }
  return 0;
}

// Only the type of Reals and, for floats, the two of 16 bits are ever written.
inline void write_element(Element element, char* to, Real x) {
  const uint16_t narrow = element == Element::kBFloat16 ? to_bfloat16(float(x)) : to_half(float(x));
  if (element == kReal)
    std::memcpy(to, &x, sizeof(Real));
  else
    std::memcpy(to, &narrow, sizeof(narrow));
}

typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));
#if !defined(REAL_IS_DOUBLE)
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));

INLINE Vec widen(Element element, HalfVec x) {
  if (element == Element::kBFloat16) return (Vec)(__builtin_convertvector(x, BitVec) << 16);
#if defined(ISA_AVX512)
  return _mm512_cvtph_ps((__m256i)x);
#elif defined(ISA_AVX2)
  return _mm256_cvtph_ps((__m128i)x);
#else
  const BitVec bits = __builtin_convertvector(x, BitVec), magnitude = (bits & 0x7fffu) << 13;
  const BitVec special = magnitude >= 0x7c00u << 13 ? BitVec{} + 0x7f800000u : BitVec{};
  return (Vec)((BitVec)((Vec)magnitude * 0x1p112f) | special | (bits & 0x8000u) << 16);
#endif
}

INLINE HalfVec narrow(Element element, Vec x) {
  if (element == Element::kBFloat16) {
    const BitVec bits = (BitVec)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return __builtin_convertvector((BitVec)(x == x ? (IntVec)rounded : (IntVec)(bits >> 16 | 0x40u)), HalfVec);
  }
#if defined(ISA_AVX512)
  return (HalfVec)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(ISA_AVX2)
  return (HalfVec)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  HalfVec result;
  for (int i = 0; i < kWidth; ++i) result[i] = to_half(x[i]);
  return result;
#endif
}
#endif

#if !defined(REAL_IS_DOUBLE)
// Of two numbers in each lane, those that have the largest exponent: infinities and NaN.
INLINE BitVec not_finite(Element element, BitVec pairs) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  const Halves exponent = (Halves)(BitVec{} + (element == Element::kBFloat16 ? 0x7f807f80u : 0x7c007c00u));
  return (BitVec)(((Halves)pairs & exponent) == exponent);
}
#endif

// Rows of 16-bit elements without gaps, which deserve to be inlined.
INLINE bool is_dense_half(Element element, int64_t stride, int64_t count) {
  return sizeof(Real) == sizeof(float) && stride == 2 && count >= kWidth &&
         (element == Element::kBFloat16 || element == Element::kFloat16);
}

// Kept out of line, for it is long and seldom what takes the time.
__attribute__((noinline)) Vec load_others(Element element, const char* from, int64_t stride, int64_t count) {
#if !defined(REAL_IS_DOUBLE)
  if (is_dense_half(element, stride, count)) return widen(element, read<HalfVec>(from));
#endif
  if (stride == 1 && count >= kWidth && element == Element::kBool)
    return __builtin_convertvector(read<ByteVec>(from), Vec);
  alignas(64) Real lanes[kWidth] = {};
  for (int i = 0; i < kWidth && i < count; ++i) lanes[i] = read_element(element, from + i * stride);
  return load(lanes);
}

__attribute__((noinline)) void store_others(Element element, char* to, int64_t stride, int64_t count, Vec x) {
#if !defined(REAL_IS_DOUBLE)
  if (is_dense_half(element, stride, count)) {
    const HalfVec halves = narrow(element, x);
    std::memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
  for (int i = 0; i < kWidth && i < count; ++i) write_element(element, to + i * stride, x[i]);
}

// `count` elements `stride` bytes apart, the other lanes 0.
INLINE Vec load_elements(Element element, const char* from, int64_t stride, int64_t count) {
  if (element != kReal) return load_others(element, from, stride, count);
  return load_some(reinterpret_cast<const Real*>(from), stride / int64_t(sizeof(Real)), count);
}

INLINE void store_elements(Element element, char* to, int64_t stride, int64_t count, Vec x) {
  if (element != kReal) return store_others(element, to, stride, count, x);
  store_some(reinterpret_cast<Real*>(to), stride / int64_t(sizeof(Real)), count, x);
}

// The same where rows of 16 bits take the time: their dense case is inlined.
INLINE Vec load_row(Element element, const char* from, int64_t stride, int64_t count) {
#if !defined(REAL_IS_DOUBLE)
  if (is_dense_half(element, stride, count)) return widen(element, read<HalfVec>(from));
#endif
  return load_elements(element, from, stride, count);
}

INLINE void store_row(Element element, char* to, int64_t stride, int64_t count, Vec x) {
#if !defined(REAL_IS_DOUBLE)
  if (is_dense_half(element, stride, count)) {
    const HalfVec halves = narrow(element, x);
    std::memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
  store_elements(element, to, stride, count, x);
}
