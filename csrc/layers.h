// The operations of a transformer layer beside attention, as the CPU kernels see them: float32 matrices.
#pragma once

#include "attention.h"

// Its first element and its strides, in elements. A stride may be 0 or negative. Null data: not given.
struct Matrix {
  float* data;
  int64_t row, column;

  explicit operator bool() const { return data != nullptr; }
  float* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

enum class Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// out = act(a b + bias) + residual
// Gated, b and bias are [gate | value]: out = act(a b_gate + bias_gate) (a b_value + bias_value) + residual
struct ProductParams {
  Matrix a, b;           // (rows, steps), (steps, columns)
  Matrix out, residual;  // (rows, columns), gated half of them; neighbours in a row lie side by side
  Matrix sums;           // (rows, columns): if given, gets a b + bias; gated products need it
  const float* bias;     // (columns,) or null
  int64_t rows, columns, steps;
  Activation activation;
  bool gated;
};

// out = act(gate), or act(gate) value where there is a value; backward: dgate and dvalue of dout. Unit columns.
struct ActivationParams {
  Matrix gate, value, out;
  Matrix dout, dgate, dvalue;
  int64_t rows, width;
  Activation activation;
};

// summed = x + residual, out = (summed - mean) rstd weight + bias, with a mean of 0 unless centred. Unit columns.
// Backward: dx of dout and of dsummed, which arrives at `summed`; dweight and dbias part by part.
struct NormParams {
  Matrix x, residual, summed, out;
  const float *weight, *bias;                // (width,) or null
  float *mean, *rstd;                        // (rows,); mean null unless centred
  Matrix dout, dsummed, dx, dweight, dbias;  // the last two (parts, width)
  int64_t rows, width;
  float eps;
};

// A 4-D tensor of floats: its first element and its strides, in elements.
struct FloatView {
  float* data;
  int64_t batch, head, seq, dim;

  float* head_of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// out_a = x_a cos - x_b sin, out_b = x_b cos + x_a sin for each pair (a, b) of x's columns.
struct RotationParams {
  FloatView x, out;    // (batch, heads, seqlen, head_dim)
  FloatView cos, sin;  // (batch, heads, seqlen, pairs), with strides of 0 where they do not vary
  int64_t batch, heads, seqlen, head_dim, pairs;
  bool interleaved, inverse;
};
