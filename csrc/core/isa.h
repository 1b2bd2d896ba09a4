// One selection for the whole process: the best instruction set that this CPU has and this build knows.
//
// An op's ISA unit (core/isa/<op>.cpp) defines one constant table of function pointers per instruction set; the op's
// driver (core/<op>.cpp) takes the selected one with LLMKERN_SELECT(table). A unit is compiled with flags that the
// CPU may lack, so it holds no global initialisers and no inline library code that the linker could share.
#pragma once
#include <initializer_list>

#include "core/isas.h"

namespace llmkern::cpu {

#define LLMKERN_ENUMERATOR(isa, condition) isa,
enum class Isa : int { LLMKERN_ISAS(LLMKERN_ENUMERATOR) };
#undef LLMKERN_ENUMERATOR

// Honours LLMKERN_CPU_ISA; throws std::invalid_argument if it names a set that is unknown, not built or not here.
Isa selected_isa();
const char* isa_name(Isa isa);

// That of the selected set, from those of all sets in order.
template <class Table>
const Table& select_table(std::initializer_list<const Table*> tables) {
  return *tables.begin()[static_cast<int>(selected_isa())];
}

}  // namespace llmkern::cpu

// Declares `table` in the namespace of every instruction set.
#define LLMKERN_DECLARE_IN(isa, condition, Type, table) \
  namespace llmkern::cpu::isa {                         \
  extern const Type table;                              \
  }
#define LLMKERN_DECLARE_TABLE(Type, table) LLMKERN_ISAS(LLMKERN_DECLARE_IN, Type, table)

#define LLMKERN_POINTER_IN(isa, condition, table) &::llmkern::cpu::isa::table,
#define LLMKERN_SELECT(table) ::llmkern::cpu::select_table({LLMKERN_ISAS(LLMKERN_POINTER_IN, table)})
