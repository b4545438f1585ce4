// csrc/cuda/launch.h where the machine is a CPU.
#pragma once

#include "machine.h"

template <class C, auto kKernel, class P>
int launch(int64_t blocks, const P& p, void*) {
  machine.run(blocks, C::kThreads, C::kShared, [&] { kKernel(p); });
  return 0;
}
