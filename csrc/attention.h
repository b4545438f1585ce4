// One attention call as the kernels see it: the only contract between Python, C++ and CUDA.
//
//   out = softmax(scale q k^T) v over the visible pairs,  lse = log(sum(exp(scale q k^T))) in natural logarithm
#pragma once

#include <cstdint>

// A 4-D tensor: its first element and its strides, in elements. A stride may be 0 or negative.
struct View {
  void* data;
  int64_t batch, head, seq, dim;

  float* head_of(int64_t b, int64_t h) const { return static_cast<float*>(data) + b * batch + h * head; }
};

constexpr int64_t kUnbounded = -1;  // of a window

struct AttentionParams {
  View q, k, v, out;      // (batch, heads or kv_heads, seqlen, head_dim or head_dim_v)
  View dout, dq, dk, dv;  // backward only
  float* lse;             // (batch, heads, seqlen_q), contiguous: written by forward, read by backward
  const float* dlse;      // like lse; null where nothing depends on lse
  int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
  float scale;
  int64_t window_left, window_right;  // or kUnbounded
  // Per batch member, untrusted values. starts null: 0. ends null: seqlen_k. Both are kv_stride apart.
  const int64_t *starts, *ends;
  int64_t kv_stride;
  const int64_t* offsets;  // null: `offset` for all, or end - seqlen_q where there is none
  int64_t offset;
  bool has_offset;
};
