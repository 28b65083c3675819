// Which instruction set runs: the best one that this machine has, or a lower one that QFUNC_CPU_ISA names.
#include <cstdlib>
#include <string>

#include "kernels.h"
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace qfunc {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool here;
};

bool has_i8mm() {
#if defined(__aarch64__) && defined(__linux__) && defined(HWCAP2_I8MM)
  return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#else
  return false;
#endif
}
bool has_dotprod() {
#if defined(__aarch64__) && defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__aarch64__) && defined(__APPLE__)
  return true;  // every Apple processor that runs macOS on Arm
#else
  return false;
#endif
}

}  // namespace

const Kernels* select_kernels(const char** error) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  const Candidate candidates[] = {{&kernels_avx512bf16, bf16}, {&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_generic, true}};
#elif defined(__aarch64__)
  const Candidate candidates[] = {{&kernels_i8mm, has_i8mm()}, {&kernels_neon, has_dotprod()}, {&kernels_generic, true}};
#else
  const Candidate candidates[] = {{&kernels_generic, true}};
#endif
  (void)has_i8mm;
  (void)has_dotprod;
  const char* asked = std::getenv("QFUNC_CPU_ISA");
  for (const Candidate& c : candidates) {
    if (asked && *asked && std::string(asked) != c.kernels->name) continue;
    if (c.here) return c.kernels;
    if (asked && *asked) {
      *error = "QFUNC_CPU_ISA names an instruction set that this machine does not have";
      return nullptr;
    }
  }
  *error = "QFUNC_CPU_ISA names no instruction set of this build; there are generic, avx2, avx512, avx512bf16 (x86-64) and generic, neon, i8mm (Arm)";
  return nullptr;
}

}  // namespace qfunc
