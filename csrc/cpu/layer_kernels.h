// The kernels of a layer's operations beside attention, for one instruction set.
#pragma once

#include "layers.h"

struct LayerKernels {
  void (*product)(const ProductParams&, int threads);
  void (*add_norm)(const NormParams&, int threads);
  void (*add_norm_backward)(const NormParams&, int threads);
  void (*activate)(const ActivationParams&, int threads);
  void (*activate_backward)(const ActivationParams&, int threads);
  void (*sum_rows)(Matrix x, float* out, int64_t rows, int64_t width, int threads);
  void (*rotate)(const RotationParams&, int threads);
};
