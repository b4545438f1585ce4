// The tables of kernels, one for each instruction set, and the one this process uses.
#pragma once

#include "attention.h"

struct Kernels {
  const char* isa;
  void (*forward)(const AttentionParams&, int threads);
  void (*backward)(const AttentionParams&, int threads);
};

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#endif
extern const Kernels kBaselineKernels;

// The widest table the CPU can run, or the narrower one that FUSED_ATTENTION_CPU_ISA names.
// Throws std::runtime_error with a sentence where that variable is wrong.
const Kernels& kernels();
