// Attention in double, for the table that every CPU of the architecture can run: SSE2 on x86-64, NEON on ARM.
#include "cpu/headers.h"

#define ISA_BASELINE
#define REAL_IS_DOUBLE
#define ISA_TARGET

namespace {
#include "cpu/kernels.inl"
}  // namespace

const AttentionKernels kBaselineDouble{forward, backward, weights, decode_pages};
