// What the binding asks of the CUDA runtime.
#pragma once

#include <string>

struct Devices {
  int count;
  int error;            // of counting them: 35 both where there is no driver and where it is too old
  int driver, runtime;  // versions, 1000 major + 10 minor; driver 0: none
};

Devices devices();

// Its name and meaning; the error is no longer the last one afterwards.
std::string error_text(int error);

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
