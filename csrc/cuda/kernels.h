// The CUDA kernels as host functions. They launch on the current device, wait for nothing and allocate nothing; what
// they return is an error of the CUDA runtime, 0 for none.
#pragma once

#include "attention.h"

using Stream = void*;  // a cudaStream_t

int forward_bfloat16(const AttentionParams& p, Stream stream);
int forward_float16(const AttentionParams& p, Stream stream);
int forward_float32(const AttentionParams& p, Stream stream);

// The same of few queries, whose keys blocks share.
int split_bfloat16(const AttentionParams& p, Stream stream);
int split_float16(const AttentionParams& p, Stream stream);
int split_float32(const AttentionParams& p, Stream stream);

// Writes delta; dk and dv where there is a dk; dq where there is one, which dslopes needs; dslopes; dbias.
int backward_bfloat16(const AttentionParams& p, Stream stream);
int backward_float16(const AttentionParams& p, Stream stream);
int backward_float32(const AttentionParams& p, Stream stream);
