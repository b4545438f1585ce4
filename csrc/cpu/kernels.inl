// Every kernel for one instruction set, from the vectors up: included in a namespace by avx512.cpp, avx2.cpp,
// baseline.cpp and their like; for double where REAL_IS_DOUBLE is defined.

#if defined(__OPTIMIZE__) && !defined(__clang__) && !defined(PARALLEL_ON_STD_THREADS)
#pragma GCC optimize("O3")  // a build that ends in -O2 would lose 7 to 13 %
#endif

#if defined(REAL_IS_DOUBLE)
typedef double Real;
constexpr double kLn2 = 0.6931471805599453, kLn2Rest = 2.3190468138462996e-17;  // their sum is ln(2)
#else
typedef float Real;
constexpr float kLn2 = 0.6931471824645996f, kLn2Rest = -1.9046542e-9f;
#endif

// clang-format off: each file uses what the ones before it define.
#include "cpu/vec.h"
#include "cpu/element.inl"
#include "cpu/tile.inl"
#include "cpu/mask.inl"
#include "cpu/layout.inl"
#include "cpu/lane_rows.inl"
#include "cpu/mask_bits.inl"
#include "cpu/dropout.inl"
#include "cpu/pairs.inl"
#include "cpu/softmax.inl"
#include "cpu/operands.inl"
#include "cpu/pair_operands.inl"
#include "cpu/key_tile.inl"
#include "cpu/query_block.inl"
#include "cpu/key_rows.inl"
#include "cpu/decode.inl"
#include "cpu/forward.inl"
#include "cpu/weights.inl"
#include "cpu/backward_head.inl"
#include "cpu/pair_block.inl"
#include "cpu/gradient_tiles.inl"
#include "cpu/backward.inl"
#if !defined(REAL_IS_DOUBLE)
#include "cpu/layer_kernels.inl"
#include "cpu/peak.inl"
#endif
// clang-format on
