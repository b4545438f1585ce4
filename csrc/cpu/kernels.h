// The tables of kernels, one for each instruction set, and the one this process uses.
#pragma once

#include "attention.h"
#include "cpu/layer_kernels.h"

struct AttentionKernels {
  void (*forward)(const AttentionParams&, int threads);
  void (*backward)(const AttentionParams&, int threads);
  void (*weights)(const AttentionParams&, bool average, int threads);
  bool (*decode_pages)(const AttentionParams&, int threads);  // false: the call does not suit it, and nothing was done
};

struct Kernels {
  const char* isa;
  AttentionKernels attention;
  const AttentionKernels* attention64;  // for float64; the other takes every other type
  LayerKernels layers;
  double (*multiply_adds)(int64_t steps);
};

#if defined(__x86_64__)
extern const Kernels kAvx512Bf16Kernels, kAvx512Kernels, kAvx2Kernels;
extern const AttentionKernels kAvx512Double, kAvx2Double;
#endif
extern const Kernels kBaselineKernels;
extern const AttentionKernels kBaselineDouble;

// The widest table the CPU can run, or the narrower one that FUSED_ATTENTION_CPU_ISA names.
// Throws std::runtime_error with a sentence where that variable is wrong.
const Kernels& kernels();
