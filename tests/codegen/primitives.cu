// Each primitive of csrc/cuda/prims.cuh in a kernel of its own, on words of memory; test_cuda_primitives.py reads their
// PTX.
#include "cuda/prims.cuh"

#define PROBE(name) extern "C" __global__ void name(const uint32_t* in, uint32_t* out)

PROBE(copy16) {
  SHARED(tile);
  copy16(tile, in, int(in[0]));
}

PROBE(commit_copies) { commit_copies(); }
PROBE(wait_for_all_copies) { wait_copies<0>(); }
PROBE(wait_for_all_but_one) { wait_copies<1>(); }

PROBE(load_matrices) {
  SHARED(tile);
  uint32_t r[4];
  load_matrices(r, tile);
  for (int i = 0; i < 4; ++i) out[i] = r[i];
}

PROBE(load_matrices_transposed) {
  SHARED(tile);
  uint32_t r[4];
  load_matrices_transposed(r, tile);
  for (int i = 0; i < 4; ++i) out[i] = r[i];
}

template <class F>
DEVICE void multiply(const uint32_t* in, uint32_t* out, F&& add_product) {
  float c[4];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = in[i], c[i] = reinterpret_cast<const float*>(in)[6 + i];
  const uint32_t b[2] = {in[4], in[5]};
  add_product(c, a, b);
  for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(out)[i] = c[i];
}

PROBE(multiply_bfloat16) {
  multiply(in, out, [](auto& c, auto& a, auto& b) { multiply_add(BFloat16(), c, a, b[0], b[1]); });
}

PROBE(multiply_float16) {
  multiply(in, out, [](auto& c, auto& a, auto& b) { multiply_add(Float16(), c, a, b[0], b[1]); });
}

PROBE(multiply_float32) {
  multiply(in, out, [](auto& c, auto& a, auto& b) { multiply_add_leading(c, a, b); });
}

PROBE(leading) { out[0] = leading(reinterpret_cast<const float*>(in)[0]); }

template <class T>
DEVICE void round_pair(const uint32_t* in, uint32_t* out) {
  const float* x = reinterpret_cast<const float*>(in);
  out[0] = pack(T(), x[0], x[1]);
}

PROBE(pack_bfloat16) { round_pair<BFloat16>(in, out); }
PROBE(pack_float16) { round_pair<Float16>(in, out); }

PROBE(widen_float16) { reinterpret_cast<float*>(out)[0] = widen(Float16(), reinterpret_cast<const uint16_t*>(in)[0]); }
PROBE(power_of_2) { reinterpret_cast<float*>(out)[0] = power_of_2(reinterpret_cast<const float*>(in)[0]); }
PROBE(multiply_high) { out[0] = multiply_high(in[0], in[1]); }
PROBE(shuffle_xor) { out[0] = shuffle_xor(in[0], 2); }
PROBE(sync_warp) { sync_warp(); }
PROBE(sync_block) { sync_block(); }
