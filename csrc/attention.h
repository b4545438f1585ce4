// One attention call as the kernels see it: the only contract between Python, C++ and CUDA.
//
//   out = softmax(softcap(scale q k^T) + bias - slope |i + offset - j|) v over the visible pairs, with dropout
//   lse = log(sum(exp(those scores)) + exp(sink)), in natural logarithm
#pragma once

#include <cstdint>

enum class Element : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16, kBool };

inline int64_t bytes_of(Element element) {
  constexpr int64_t kBytes[] = {4, 8, 2, 2, 1};
  return kBytes[static_cast<int64_t>(element)];
}

// A 4-D tensor: its first element and its strides, in bytes. A stride may be 0 or negative. Of a mask or bias, seq
// counts queries and dim keys.
struct View {
  char* data;
  Element element;
  int64_t batch, head, seq, dim;

  char* at(int64_t b, int64_t h, int64_t row) const { return data + b * batch + h * head + row * seq; }
};

constexpr int64_t kUnbounded = -1;  // of a window

// What is absent is null. "Real" is the type that sums are kept in: double for double, else float.
struct AttentionParams {
  View q, k, v, out;      // (batch, heads or kv_heads, seqlen, head_dim or head_dim_v)
  View dout, dq, dk, dv;  // backward only; dk and dv can be Reals where the heads of a group add up
  View mask, bias;        // (batch, heads, seqlen_q, seqlen_k), a stride of 0 where the size is 1
  View dbias;             // Reals, 0 at first; every head adds to it
  void* lse;              // Reals: written by forward, read by backward
  const void* dlse;       // like lse
  void* delta;            // like lse: rowsum(dout out) - dlse, where someone needs it
  int64_t lse_batch, lse_head;
  const void* slopes;  // Reals: ALiBi of (batch, heads), slopes_batch apart
  int64_t slopes_batch;
  void* dslopes;      // Reals (batch, heads)
  void* row_dslopes;  // like lse: what each row adds to dslopes; CUDA alone
  const void* sinks;  // Reals (heads,)
  int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
  double scale, softcap;              // softcap 0: none
  int64_t window_left, window_right;  // or kUnbounded
  // Per batch member, untrusted values. starts null: 0. ends null: seqlen_k. Both are kv_stride apart.
  const int64_t *starts, *ends;
  int64_t kv_stride;
  const int64_t* offsets;  // null: `offset` for all, or end - seqlen_q where there is none
  int64_t offset;
  bool has_offset;
  // Packed sequences, whose rows all lie in member 0: where those of each member begin, batch + 1 untrusted values.
  const int64_t *cu_seqlens_q, *cu_seqlens_k;
  // Keys in pages: rows of k and v are those of a page, their batch the page, and page_table, page_table_batch apart,
  // holds the untrusted pages of each member in order. Null: they lie in its own rows.
  const int32_t* page_table;
  int64_t page_table_batch, pages, page_size;
  const int64_t* dropout_seed;  // (seed, offset)
  int64_t dropout_threshold;    // a random word below it drops the pair
  double dropout_scale;         // of what is kept
  // CUDA alone: of each `split_keys` keys the rows (batch, heads, seqlen_q) of head_dim_v that they give, and their
  // lse.
  float *split_out, *split_lse;
  int64_t split_keys;
};
