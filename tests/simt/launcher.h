// csrc/cuda/launch.h where the machine is a CPU.
#pragma once

#include "machine.h"

template <class C, class P>
int launch(void (*kernel)(P), int64_t blocks, const P& p, void*) {
  machine.run(blocks, C::kThreads, C::kShared, [&] { kernel(p); });
  return 0;
}

template <class C, class P>
int load(void (*)(P)) {
  return 0;
}
