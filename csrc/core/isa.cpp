#include "core/isa.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace llmkern::cpu {
namespace {

// What the compiler's builtin takes is a literal.
#define has(feature) __builtin_cpu_supports(feature)

struct InstructionSet {
  const char* name;
  bool (*is_here)();
};
#define LLMKERN_ROW(isa, condition) {.name = #isa, .is_here = [] { return bool{condition}; }},
constexpr InstructionSet kSets[] = {LLMKERN_ISAS(LLMKERN_ROW)};

#undef LLMKERN_ROW
#undef has

// "baseline, avx2 or avx512".
std::string names() {
  constexpr size_t n = std::size(kSets);
  std::string text;
  for (size_t i = n; i-- > 0;) {
    if (i + 1 < n) text += i == 0 ? " or " : ", ";
    text += kSets[i].name;
  }
  return text;
}

Isa choose() {
  const char* const value = std::getenv("LLMKERN_CPU_ISA");
  const std::string wanted = value ? value : "";
  for (size_t i = 0; i < std::size(kSets); ++i) {
    if (!wanted.empty() && wanted != kSets[i].name) continue;
    if (kSets[i].is_here()) return static_cast<Isa>(i);
    if (!wanted.empty()) throw std::invalid_argument("LLMKERN_CPU_ISA=" + wanted + ", but this CPU does not have it");
  }
  throw std::invalid_argument("LLMKERN_CPU_ISA=" + wanted + "; expected " + names());
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) { return kSets[static_cast<int>(isa)].name; }

}  // namespace llmkern::cpu
