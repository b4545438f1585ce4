// The CUDA kernels as host functions. They launch on the current device, wait for nothing and allocate nothing; what
// they return is an error of the CUDA runtime, 0 for none.
#pragma once

#include "attention.h"

using Stream = void*;  // a cudaStream_t

int forward_bfloat16(const AttentionParams& p, Stream stream);
int forward_float16(const AttentionParams& p, Stream stream);

// Writes delta, dk and dv where there is a dk, and dq where there is one.
int backward_bfloat16(const AttentionParams& p, Stream stream);
int backward_float16(const AttentionParams& p, Stream stream);

// Loads every kernel, which a launch under graph capture could not.
int load_bfloat16();
int load_float16();
