// A vector of kWidth Reals on the compiler's vector extensions; with element.inl the only file that names instructions.
//
// The including file defines ISA_AVX512, ISA_AVX2 or ISA_BASELINE, ISA_TARGET, the function attribute that allows its
// instructions, and Real, with REAL_IS_DOUBLE where that is double: it is included once for each type.
// (Macros of our own: g++ up to 12 does not define __AVX512F__ after a target pragma.)

#ifndef INLINE
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline)) ISA_TARGET
#define JOIN_NAMES(a, b) a##b
#define JOIN(a, b) JOIN_NAMES(a, b)
#endif

#undef SUFFIX
#if defined(REAL_IS_DOUBLE)
#define SUFFIX pd
typedef int64_t Int;
typedef uint64_t Bits;
constexpr int kMantissaBits = 52, kExponentBias = 1023;
constexpr Real kRounder = 0x1.8p52;  // added and taken away again, it rounds to a whole number
#else
#define SUFFIX ps
typedef int32_t Int;
typedef uint32_t Bits;
constexpr int kMantissaBits = 23, kExponentBias = 127;
constexpr Real kRounder = 0x1.8p23f;
#endif

#if defined(ISA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(ISA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kWidth = kVectorBytes / sizeof(Real);

typedef Real Vec __attribute__((vector_size(kVectorBytes)));
typedef Real UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));
typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
typedef Bits BitVec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WideVec __attribute__((vector_size(kVectorBytes)));

INLINE Vec load(const Real* from) { return (Vec) * (const UnalignedVec*)from; }
INLINE void store(Real* to, Vec x) { *(UnalignedVec*)to = x; }
INLINE Vec broadcast(Real x) { return Vec{} + x; }
INLINE IntVec broadcast(Int x) { return IntVec{} + x; }

INLINE Vec broadcast_from(const Real* from) {
#if defined(ISA_AVX512)
  return JOIN(_mm512_set1_, SUFFIX)(*from);
#else
  return Vec{} + *from;
#endif
}

// a * b + c, fused where the machine can. Elsewhere too compilers fuse `a * b + c`, but not where a select follows or
// where they could fuse another product instead: what must have the same bits in every lane and variant of a kernel
// says so.
INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(ISA_AVX512)
  return JOIN(_mm512_fmadd_, SUFFIX)(a, b, c);
#elif defined(ISA_AVX2)
  return JOIN(_mm256_fmadd_, SUFFIX)(a, b, c);
#elif defined(__aarch64__) && defined(REAL_IS_DOUBLE)
  return (Vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// A NaN among the operands may be dropped or kept: whoever needs it kept sees it elsewhere.
INLINE Vec larger(Vec a, Vec b) {
#if defined(ISA_AVX512)
  return JOIN(_mm512_max_, SUFFIX)(a, b);
#elif defined(ISA_AVX2)
  return JOIN(_mm256_max_, SUFFIX)(a, b);
#elif defined(__SSE2__)
  return JOIN(_mm_max_, SUFFIX)(a, b);
#else
  return a > b ? a : b;
#endif
}

// x, but no more than the bound; a NaN stays.
INLINE Vec no_more_than(Vec bound, Vec x) {
#if defined(ISA_AVX512)
  return JOIN(_mm512_min_, SUFFIX)(bound, x);
#elif defined(ISA_AVX2)
  return JOIN(_mm256_min_, SUFFIX)(bound, x);
#elif defined(__SSE2__)
  return JOIN(_mm_min_, SUFFIX)(bound, x);
#else
  return x > bound ? bound : x;
#endif
}

// Products of the lower halves of 64-bit lanes.
INLINE WideVec multiply_halves(WideVec a, uint32_t b) {
#if defined(ISA_AVX512)
  return (WideVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(ISA_AVX2)
  return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (WideVec)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

#if defined(REAL_IS_DOUBLE)
// 2^f - 1 = f p(f) for |f| <= 1/2: Taylor's series, whose next term is below 2^-57.
constexpr Real kExp2Series[] = {
    1.369148885390412e-12, 2.5678435993488206e-11, 4.4455382718708116e-10, 7.054911620801123e-9,  1.0178086009239699e-7,
    1.3215486790144307e-6, 1.5252733804059838e-5,  1.5403530393381606e-4,  1.3333558146428441e-3, 9.618129107628477e-3,
    5.550410866482158e-2,  2.402265069591007e-1,   6.931471805599453e-1};
#else
// The same, minimax of degree 6: 2^f is within 0.7 units in the last place.
constexpr Real kExp2Series[] = {1.5353362e-4f, 1.3398874e-3f, 9.618437e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f};
// Of degree 4: within 2^-18, for what is rounded to 16 bits anyhow.
constexpr Real kShortExp2Series[] = {9.5828529e-3f, 5.5906426e-2f, 2.4024099e-1f, 6.9312418e-1f};
#endif

INLINE Vec round_to_integer(Vec x) {
#if defined(ISA_AVX512)
  return JOIN(_mm512_roundscale_, SUFFIX)(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return x + kRounder - kRounder;
#endif
}

template <size_t kTerms>
INLINE Vec exp2_series(const Real (&series)[kTerms], Vec f) {
  Vec p = broadcast(series[0]);
#pragma GCC unroll 16
  for (size_t i = 1; i < kTerms; ++i) p = fused(p, f, broadcast(series[i]));
  return p;
}

// p 2^n for a whole n in [-kExponentBias, kExponentBias]; with the first of them 0.
INLINE Vec times_power_of_2(Vec p, Vec n) {
#if defined(ISA_AVX512)
  return JOIN(_mm512_scalef_, SUFFIX)(p, n);  // (NaN, -inf) is 0 by definition
#else
  return p * (Vec)(((BitVec)(n + kRounder) + Bits(kExponentBias)) << kMantissaBits);
#endif
}

// 2^x = 2^n p(x - n) with n = round(x).
// Exactly 0 for -inf and NaN for NaN: a hidden score has no weight at all, and a visible NaN is not lost.
template <size_t kTerms>
INLINE Vec exp2_by(const Real (&series)[kTerms], Vec x) {
#if !defined(ISA_AVX512)
  const Vec floor = broadcast(Real(-kExponentBias));
  x = x < floor ? floor : x;  // a NaN stays
#endif
  const Vec n = round_to_integer(x), f = x - n;
  return times_power_of_2(fused(exp2_series(series, f), f, broadcast(Real(1))), n);
}
INLINE Vec exp2(Vec x) { return exp2_by(kExp2Series, x); }

// tanh(x) = e / (e + 2), e = 2^y - 1 for y = 2 log2(e) x; small x keep their digits, for then n = 0 and e = f p(f).
INLINE Vec tanh_of(Vec y) {
  const Vec far = broadcast(Real(64));
  y = y > far ? far : y;
  y = y < -far ? -far : y;  // a NaN stays
  const Vec n = round_to_integer(y), f = y - n, power = times_power_of_2(broadcast(Real(1)), n);
  const Vec e = fused(exp2_series(kExp2Series, f) * f, power, power - Real(1));
  return e / (e + Real(2));
}

// Natural logarithm of x >= 1 to one unit in the last place (Cephes' logf); NaN for NaN.
INLINE Vec log(Vec x) {
#if defined(REAL_IS_DOUBLE)
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = ::log(x[i]);
  return result;
#else
  const BitVec bits = (BitVec)x - 0x3f3504f3u;  // sqrt(1/2): the mantissa becomes [sqrt(1/2), sqrt(2))
  const Vec e = __builtin_convertvector((IntVec)bits >> 23, Vec);
  const Vec f = (Vec)((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  Vec p = broadcast(7.0376836292e-2f);
  for (const float coefficient : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                  -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f, -0.5f})
    p = fused(p, f, broadcast(coefficient));
  Vec result = fused(f * f, p, f);
  result = fused(e, broadcast(-2.12194440e-4f), result);
  result = fused(e, broadcast(0.693359375f), result);
  return x == x ? result : x;
#endif
}

template <int kBy, int... I>
INLINE Vec rotate(Vec x, int_list<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (I + kBy) % kWidth...);
#else
  return __builtin_shuffle(x, IntVec{(I + kBy) % kWidth...});
#endif
}

// The sum of all lanes, by halves.
template <int kHalf = kWidth / 2>
INLINE Real sum(Vec x) {
  if constexpr (kHalf == 0)
    return x[0];
  else
    return sum<kHalf / 2>(x + rotate<kHalf>(x, make_int_list<kWidth>{}));
}

INLINE bool all_zero(Vec x) {
  bool result = true;
  for (int i = 0; i < kWidth; ++i) result &= x[i] == Real(0);
  return result;
}

// `count` elements `stride` apart, the other lanes 0.
INLINE Vec load_some(const Real* from, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kWidth) return load(from);
  alignas(64) Real lanes[kWidth] = {};
  for (int i = 0; i < kWidth && i < count; ++i) lanes[i] = from[i * stride];
  return load(lanes);
}

INLINE void store_some(Real* to, int64_t stride, int64_t count, Vec x) {
  if (stride == 1 && count >= kWidth) return store(to, x);
  alignas(64) Real lanes[kWidth];
  store(lanes, x);
  for (int i = 0; i < kWidth && i < count; ++i) to[i * stride] = lanes[i];
}

template <int... I>
INLINE Vec interleave(Vec a, Vec b, int_list<I...>, bool upper) {
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, (I / 2 + kWidth / 2 + I % 2 * kWidth)...)
               : __builtin_shufflevector(a, b, (I / 2 + I % 2 * kWidth)...);
#else
  return upper ? __builtin_shuffle(a, b, IntVec{(I / 2 + kWidth / 2 + I % 2 * kWidth)...})
               : __builtin_shuffle(a, b, IntVec{(I / 2 + I % 2 * kWidth)...});
#endif
}

// Rows become columns in log2(kWidth) rounds of interleaving.
INLINE void transpose(Vec (&rows)[kWidth]) {
  Vec next[kWidth];
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + kWidth / 2], make_int_list<kWidth>{}, false);
      next[2 * i + 1] = interleave(rows[i], rows[i + kWidth / 2], make_int_list<kWidth>{}, true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}
