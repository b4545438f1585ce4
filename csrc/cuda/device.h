// What the binding asks of the CUDA runtime.
#pragma once

#include <string>
#include <vector>

struct Devices {
  int count;
  int error;            // of counting them: 35 both where there is no driver and where it is too old
  int driver, runtime;  // versions, 1000 major + 10 minor; driver 0: none
};

Devices devices();

// Its name and meaning; the error is no longer the last one afterwards.
std::string error_text(int error);

// A kernel, and what a launch gives each of its blocks: threads, and bytes of shared memory.
struct Kernel {
  // From then on it is one of kernels(). The signature, as a compiler writes it, ends with `= name<its arguments>]`.
  Kernel(const void* function, const std::string& signature, int threads, int shared);

  const void* const function;
  const std::string name;  // with its template's arguments
  const int threads, shared;
};

std::vector<const Kernel*>& kernels();

// Loads every kernel on the current device, whose number is given, at the first call for it: to load one at its first
// launch is not allowed under graph capture. An error of the runtime, or 0.
int load_kernels(int device);

// Makes a device current for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: it was this one
};
