// The table that every CPU of the architecture can run: SSE2 on x86-64, NEON on ARM.
#include "cpu/headers.h"

#define ISA_BASELINE
#define ISA_TARGET

namespace {
#include "cpu/kernels.inl"
}  // namespace

const Kernels kBaselineKernels{
    "baseline", {forward, backward, weights, decode_pages}, &kBaselineDouble, kLayerKernels, multiply_adds};
