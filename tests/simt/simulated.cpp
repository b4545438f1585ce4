// The CUDA sources as a library for the CPU, with what the runtime would answer there; simulation.py drives it.
#include <cstdio>

#include "cuda/bfloat16.cu"
#include "cuda/device.h"
#include "cuda/float16.cu"
#include "cuda/float32.cu"

Devices devices() { return {1, 0, 13000, 13000}; }
std::string error_text(int error) { return "error " + std::to_string(error); }
std::vector<const Kernel*>& kernels() {
  static std::vector<const Kernel*> none;
  return none;
}
int load_kernels(int) { return 0; }
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

// Row and column of a number in the matrix that operand 'A', 'B' or 'C' of mma is a part of.
__attribute__((visibility("default"))) void simt_fragment(char operand, int bits, int lane, int j, int half,
                                                          int* place) {
  const Place at = operand == 'A'   ? place_of_left(bits, lane, j, half)
                   : operand == 'B' ? place_of_right(bits, lane, j, half)
                                    : place_of_sum(lane, j);
  place[0] = at.row, place[1] = at.column;
}

// The byte of a tile where a row's chunk begins.
__attribute__((visibility("default"))) unsigned simt_chunk(int columns, unsigned row, unsigned chunk) {
  return columns == 64    ? place<BFloat16, 64>(row, chunk)
         : columns == 128 ? place<BFloat16, 128>(row, chunk)
                          : place<BFloat16, 256>(row, chunk);
}
}
