// The kernels for bfloat16.
#include "cuda/dispatch.inl"

int forward_bfloat16(const AttentionParams& p, Stream stream) { return forward_of<BFloat16>(p, stream); }
int split_bfloat16(const AttentionParams& p, Stream stream) { return split_of<BFloat16>(p, stream); }
int backward_bfloat16(const AttentionParams& p, Stream stream) { return backward_of<BFloat16>(p, stream); }
