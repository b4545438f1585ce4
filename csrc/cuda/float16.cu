// The kernels for float16.
#include "cuda/dispatch.inl"

int forward_float16(const AttentionParams& p, Stream stream) { return forward_of<Float16>(p, stream); }
int split_float16(const AttentionParams& p, Stream stream) { return split_of<Float16>(p, stream); }
int backward_float16(const AttentionParams& p, Stream stream) { return backward_of<Float16>(p, stream); }
