// What the kernels ask of the machine: the only PTX, and the only accesses to memory.
//
// The same names run on a CPU where SIMT_SHIM is defined; there every access and every barrier is checked.
#pragma once

#include <cstdint>

// The types of q, k and v.
struct BFloat16 {};
struct Float16 {};
struct Float32 {};

template <class T>
constexpr int kBytes = 2;
template <>
constexpr int kBytes<Float32> = 4;

#ifdef SIMT_SHIM
#include "primitives.h"
#else

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define ARGUMENT const __grid_constant__
#define SHARED(name) extern __shared__ __align__(128) char name[]

DEVICE unsigned thread_index() { return threadIdx.x; }  // of signed ones quotients take more registers
DEVICE int64_t block_index() { return blockIdx.x; }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE bool sync_block_or(bool x) { return __syncthreads_or(x); }

template <class U>
DEVICE U shuffle_xor(U x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

template <class U>
DEVICE U load_shared(const void* at) {
  return *static_cast<const U*>(at);
}

template <class U>
DEVICE void store_shared(void* at, U x) {
  *static_cast<U*>(at) = x;
}

template <class U>
DEVICE U load_global(const void* at) {
  return *static_cast<const U*>(at);
}

template <class U>
DEVICE void store_global(void* at, U x) {
  *static_cast<U*>(at) = x;
}

DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Asynchronously 16 bytes, of which all but the first `bytes` are 0; with none `from` is not read.
DEVICE void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// For all but the latest kPending groups of this thread's copies.
template <int kPending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16 bits; lane l gives the address of row l mod 8 of matrix l div 8.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#define MULTIPLY_ADD(type, name)                                                                    \
  DEVICE void multiply_add(type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                      \
        ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"                                                 \
        "{%0,%1,%2,%3};"                                                                            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                            \
  }
// c (16x8) += a (16x16) b (16x8)
MULTIPLY_ADD(BFloat16, "bf16")
MULTIPLY_ADD(Float16, "f16")
#undef MULTIPLY_ADD

// The 11 leading bits of a number, rounded.
DEVICE uint32_t leading(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0,%1;" : "=r"(r) : "f"(x));
  return r;
}

// c (16x8) += a (16x8) b (8x8), of numbers with 11 leading bits.
DEVICE void multiply_add_leading(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

DEVICE uint32_t pack(BFloat16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DEVICE uint32_t pack(Float16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DEVICE float widen(BFloat16, uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }

DEVICE float widen(Float16, uint16_t x) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(x));
  return r;
}

DEVICE float power_of_2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

// The upper half of a product.
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

#endif

// c (16x8) += a (16x8) b (8x8) in float32, but for the product of what follows the leading bits of both.
DEVICE void multiply_add(Float32, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t a_leads[4], a_rest[4], b_leads[2], b_rest[2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a_leads[j] = leading(as_float(a[j]));
    a_rest[j] = leading(as_float(a[j]) - as_float(a_leads[j]));
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float x = as_float(j ? b1 : b0);
    b_leads[j] = leading(x);
    b_rest[j] = leading(x - as_float(b_leads[j]));
  }
  multiply_add_leading(c, a_rest, b_leads);
  multiply_add_leading(c, a_leads, b_rest);
  multiply_add_leading(c, a_leads, b_leads);
}
