// Every kernel for one instruction set: included inside a namespace by avx512.cpp, avx2.cpp and baseline.cpp.
#include "vec.h"
// (above: vectors; below: what is built of them)
#include "layout.inl"
#include "mask.inl"
#include "tile.inl"
#include "forward.inl"
#include "backward_head.inl"
#include "backward.inl"
