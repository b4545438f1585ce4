// Launching a kernel of a configuration C.
#pragma once

#ifdef SIMT_SHIM
#include "launcher.h"
#else

#include <cuda_runtime.h>

#include "attention.h"
#include "cuda/device.h"

template <class C, void (*kKernel)(AttentionParams)>
struct Launched {
  static const char* signature() { return __PRETTY_FUNCTION__; }
  static inline const Kernel entry{reinterpret_cast<const void*>(kKernel), signature(), C::kThreads, C::kShared};
};

template <class C, void (*kKernel)(AttentionParams)>
int launch(int64_t blocks, const AttentionParams& p, void* stream) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // of the first dimension of a grid, the only one in use
  (void)&Launched<C, kKernel>::entry;                // makes it one of those that load_kernels() loads
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMost) return cudaErrorInvalidConfiguration;
  kKernel<<<unsigned(blocks), C::kThreads, C::kShared, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

#endif
