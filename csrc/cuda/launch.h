// Launching a kernel of a configuration C, and loading it ahead of its first launch.
#pragma once

#ifdef SIMT_SHIM
#include "launcher.h"
#else

#include <cuda_runtime.h>

#include "attention.h"

template <class C>
int launch(void (*kernel)(AttentionParams), int64_t blocks, const AttentionParams& p, void* stream) {
  if (blocks == 0) return cudaSuccess;
  if (C::kShared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), C::kThreads, C::kShared, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

template <class C>
int load(void (*kernel)(AttentionParams)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

#endif
