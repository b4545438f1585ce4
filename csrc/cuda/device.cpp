// device.h on the CUDA runtime. Nothing here runs when the module is imported: that would open the driver.
#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <set>
#include <stdexcept>

Devices devices() {
  Devices found{};
  found.error = cudaGetDeviceCount(&found.count);
  if (found.error) found.count = 0;
  cudaGetLastError();
  if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
  if (cudaRuntimeGetVersion(&found.runtime) != cudaSuccess) found.runtime = CUDART_VERSION;
  cudaGetLastError();
  return found;
}

std::string error_text(int error) {
  cudaGetLastError();
  const auto code = static_cast<cudaError_t>(error);
  return std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code);
}

namespace {

int load(const Kernel& kernel) {
  // With lazy loading this is what loads; to set an attribute is not.
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
  if (error || kernel.shared <= 48 * 1024) return error;
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared);
}

}  // namespace

Kernel::Kernel(const void* function, const std::string& signature, int threads, int shared)
    : function(function),
      name(signature.substr(signature.rfind(" = ") + 3, signature.rfind(']') - signature.rfind(" = ") - 3)),
      threads(threads),
      shared(shared) {
  kernels().push_back(this);
}

std::vector<const Kernel*>& kernels() {
  static std::vector<const Kernel*> all;
  return all;
}

int load_kernels(int device) {
  static std::set<int> done;  // the interpreter's lock guards it
  if (done.count(device)) return 0;
  for (const Kernel* kernel : kernels())
    if (const int error = load(*kernel)) return error;
  done.insert(device);
  return 0;
}

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  int error = cudaGetDevice(&current);
  if (!error && current != device) {
    error = cudaSetDevice(device);
    if (!error) before_ = current;
  }
  if (error)
    throw std::runtime_error("device " + std::to_string(device) + " cannot be made current: " + error_text(error));
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}
