#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace llmkern::cpu {
namespace {

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  if (isa != Isa::baseline) return false;
#endif
  return true;
}

Isa choose() {
  const char* wanted = std::getenv("LLMKERN_CPU_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (wanted && *wanted ? std::string(wanted) == isa_name(isa) : cpu_has(isa)) {
      if (cpu_has(isa)) return isa;
      throw std::invalid_argument(std::string("LLMKERN_CPU_ISA=") + wanted + ", but this CPU does not have it");
    }
  }
  throw std::invalid_argument(std::string("LLMKERN_CPU_ISA=") + wanted + "; expected baseline, avx2 or avx512");
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  if (isa == Isa::avx512) return "avx512";
  return isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace llmkern::cpu
