// A vector of kWidth floats on the compiler's vector extensions; the only file that names instructions.
//
// The including file defines ISA_AVX512, ISA_AVX2 or ISA_BASELINE and ISA_TARGET, the function attribute that allows
// its instructions. (Macros of our own: g++ up to 12 does not define __AVX512F__ after a target pragma.)
#pragma once

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline)) ISA_TARGET

#if defined(ISA_AVX512)
constexpr int kWidth = 16;
#elif defined(ISA_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float UnalignedVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kWidth * 4)));

INLINE Vec load(const float* from) { return (Vec) * (const UnalignedVec*)from; }
INLINE void store(float* to, Vec x) { *(UnalignedVec*)to = x; }
INLINE Vec broadcast(float x) { return Vec{} + x; }
INLINE IntVec broadcast(int32_t x) { return IntVec{} + x; }

INLINE Vec broadcast_from(const float* from) {
#if defined(ISA_AVX512)
  return _mm512_set1_ps(*from);
#else
  return Vec{} + *from;
#endif
}

// a * b + c, fused where the machine can. Elsewhere too compilers fuse `a * b + c`, but not where a select follows or
// where they could fuse another product instead: what must have the same bits in every lane and variant of a kernel
// says so.
INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(ISA_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(ISA_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// A NaN among the operands may be dropped or kept: whoever needs it kept sees it elsewhere.
INLINE Vec larger(Vec a, Vec b) {
#if defined(ISA_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(ISA_AVX2)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 2^x = 2^n p(x - n) with n = round(x), and p minimax of degree 6 with p(0) = 1: within 0.7 units in the last place.
// Exactly 0 for -inf and NaN for NaN: a hidden score has no weight at all, and a visible NaN is not lost.
INLINE Vec exp2(Vec x) {
#if defined(ISA_AVX512)
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec floor = broadcast(-127.0f);
  x = x < floor ? floor : x;          // a NaN stays
  const Vec shifted = x + 0x1.8p23f;  // puts the rounded x into the lowest bits
  const Vec n = shifted - 0x1.8p23f;
#endif
  const Vec f = x - n;
  Vec p = broadcast(1.5353362e-4f);
  for (const float coefficient : {1.3398874e-3f, 9.618437e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f, 1.0f})
    p = fused(p, f, broadcast(coefficient));
#if defined(ISA_AVX512)
  return _mm512_scalef_ps(p, n);  // (NaN, -inf) is 0 by definition
#else
  return p * (Vec)(((BitVec)shifted + 127u) << 23);  // n = -127 makes the factor 0
#endif
}

// Natural logarithm of x >= 1 to one unit in the last place (Cephes' logf); NaN for NaN.
INLINE Vec log(Vec x) {
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
}

INLINE float sum(Vec x) {
  float total = 0;
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  total += x[0];
  return total;
}

INLINE bool all_zero(Vec x) {
  bool result = true;
  for (int i = 0; i < kWidth; ++i) result &= x[i] == 0.0f;
  return result;
}

// `count` elements `stride` apart, the other lanes 0.
INLINE Vec load_some(const float* from, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kWidth) return load(from);
  alignas(64) float lanes[kWidth] = {};
  for (int i = 0; i < kWidth && i < count; ++i) lanes[i] = from[i * stride];
  return load(lanes);
}

INLINE void store_some(float* to, int64_t stride, int64_t count, Vec x) {
  if (stride == 1 && count >= kWidth) return store(to, x);
  alignas(64) float lanes[kWidth];
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
