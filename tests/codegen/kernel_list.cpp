// The CUDA kernels of a library, a line each: name, a block's threads and bytes of shared memory, between tabs.
#include "cuda/device.h"

extern "C" __attribute__((visibility("default"))) const char* kernel_list() {
  static const std::string lines = [] {
    std::string all;
    for (const Kernel* kernel : kernels())
      all += kernel->name + '\t' + std::to_string(kernel->threads) + '\t' + std::to_string(kernel->shared) + '\n';
    return all;
  }();
  return lines.c_str();
}
