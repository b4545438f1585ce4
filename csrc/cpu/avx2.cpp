// The table for AVX2 with FMA.
#include "cpu/headers.h"

#if defined(__x86_64__)
#define ISA_AVX2
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__)
#pragma clang attribute push(ISA_TARGET, apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {
#include "cpu/kernels.inl"
}  // namespace

const Kernels kAvx2Kernels{
    "avx2", {forward, backward, weights, decode_pages}, &kAvx2Double, kLayerKernels, multiply_adds};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
