// The kernels for bfloat16.
#include "cuda/dispatch.inl"

int forward_bfloat16(const AttentionParams& p, Stream stream) { return forward_of<BFloat16>(p, stream); }
int backward_bfloat16(const AttentionParams& p, Stream stream) { return backward_of<BFloat16>(p, stream); }
int load_bfloat16() { return load_of<BFloat16>(); }
