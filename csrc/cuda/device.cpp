// device.h on the CUDA runtime. Nothing here runs when the module is imported: that would open the driver.
#include "cuda/device.h"

#include <cuda_runtime_api.h>

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
