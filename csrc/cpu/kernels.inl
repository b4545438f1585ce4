// Every kernel for one instruction set, from the vectors up: included in a namespace by avx512.cpp, avx2.cpp and
// baseline.cpp.

#if !defined(__clang__)
#pragma GCC optimize("O3")  // a build that ends in -O2 would lose 7 to 13 %
#endif

// clang-format off: each file uses what the ones before it define.
#include "cpu/vec.h"
#include "cpu/tile.inl"
#include "cpu/mask.inl"
#include "cpu/layout.inl"
#include "cpu/forward.inl"
#include "cpu/backward_head.inl"
#include "cpu/backward.inl"
// clang-format on
