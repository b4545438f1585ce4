// The CUDA sources as a library for the CPU, with what the runtime would answer there; simulation.py drives it.
#include <cstdio>

#include "cuda/bfloat16.cu"
#include "cuda/device.h"
#include "cuda/float16.cu"

Devices devices() { return {1, 0, 13000, 13000}; }
std::string error_text(int error) { return "error " + std::to_string(error); }
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

extern "C" {
// Before a launch: no tensors are known, nothing has been found; a seed of 0 keeps the warps in order.
__attribute__((visibility("default"))) void simt_reset(unsigned seed) {
  findings = {};
  global_memory.clear();
  machine.seed = seed;
}

__attribute__((visibility("default"))) void simt_watch(const char* begin, size_t bytes, bool writable) {
  global_memory.add(begin, bytes, writable);
}

__attribute__((visibility("default"))) void simt_report(long* counts, char* told, size_t size) {
  std::copy(findings.counts, findings.counts + kFindings, counts);
  std::snprintf(told, size, "%s", findings.told.c_str());
}
}
