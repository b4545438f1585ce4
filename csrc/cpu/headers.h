// Every standard header of the kernels. They must come before a target pragma: an inline function of theirs compiled
// for AVX-512 could be the copy that the linker keeps for the whole process.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attention.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "mask.h"

template <int... I>
using int_list = std::integer_sequence<int, I...>;
template <int N>
using make_int_list = std::make_integer_sequence<int, N>;
