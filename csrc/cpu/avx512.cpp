// The table for AVX-512.
#include "cpu/headers.h"

#if defined(__x86_64__)
#define ISA_AVX512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#if defined(__clang__)
#pragma clang attribute push(ISA_TARGET, apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "cpu/kernels.inl"
}  // namespace

const Kernels kAvx512Kernels{
    "avx512", {forward, backward, weights, decode_pages}, &kAvx512Double, kLayerKernels, multiply_adds};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
