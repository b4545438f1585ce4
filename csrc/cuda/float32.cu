// The kernels for float32: three products of the leading bits of its numbers and of the rest.
#include "cuda/dispatch.inl"

int forward_float32(const AttentionParams& p, Stream stream) { return forward_of<Float32>(p, stream); }
int split_float32(const AttentionParams& p, Stream stream) { return split_of<Float32>(p, stream); }
int backward_float32(const AttentionParams& p, Stream stream) { return backward_of<Float32>(p, stream); }
