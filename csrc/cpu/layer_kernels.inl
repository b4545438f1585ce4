// The operations of a layer beside attention, for one instruction set; kernels.inl includes it after the tile.

// clang-format off: each file uses what the ones before it define.
#include "cpu/activation.inl"
#include "cpu/lanes.inl"
#include "cpu/linear.inl"
#include "cpu/norm.inl"
#include "cpu/pointwise.inl"
#include "cpu/rotation.inl"
// clang-format on

constexpr LayerKernels kLayerKernels{product,  add_norm, add_norm_backward, activate, activate_backward,
                                     sum_rows, rotate};
