// Chooses the table of kernels: once, when it is first asked for.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/kernels.h"

namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;  // on this CPU
};

#if defined(__x86_64__)
// Conversions of float16, CPUID 1, ECX bit 29: __builtin_cpu_supports of g++ before 11 does not know its name.
bool supports_half() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  // Widest first.
  const Choice choices[] = {
#if defined(__x86_64__)
      {&kAvx512Bf16Kernels, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_half()},
#endif
      {&kBaselineKernels, true},
  };
  const char* variable = std::getenv("FUSED_ATTENTION_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string able;
  for (const Choice& choice : choices) {
    if (!choice.runs) continue;
    if (wanted.empty() || wanted == choice.kernels->isa) return *choice.kernels;
    able += (able.empty() ? "" : ", ") + std::string(choice.kernels->isa);
  }
  throw std::runtime_error("FUSED_ATTENTION_CPU_ISA is '" + wanted + "', and this CPU can run " + able +
                           ": name one of these, or unset the variable");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}
