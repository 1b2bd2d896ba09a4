// One selection for the whole process: the best instruction set that this CPU has and this build knows.
//
// An op's ISA unit (core/isa/<op>.cpp) defines one constant table of function pointers per instruction set; the op's
// driver (core/<op>.cpp) takes the selected one with LLMKERN_SELECT(table). A unit is compiled with flags that the
// CPU may lack, so it holds no global initialisers and no inline library code that the linker could share.
#pragma once

namespace llmkern::cpu {

enum class Isa { baseline, avx2, avx512 };

// Honours LLMKERN_CPU_ISA; throws std::invalid_argument if it names a set that is unknown, not built or not here.
Isa selected_isa();
const char* isa_name(Isa isa);

}  // namespace llmkern::cpu

// Declares `table` in the namespace of every instruction set that was built.
#if defined(__x86_64__)
#define LLMKERN_DECLARE_TABLE(Type, table) \
  namespace llmkern::cpu::baseline {       \
  extern const Type table;                 \
  }                                        \
  namespace llmkern::cpu::avx2 {           \
  extern const Type table;                 \
  }                                        \
  namespace llmkern::cpu::avx512 {         \
  extern const Type table;                 \
  }
#define LLMKERN_SELECT(table)                                                                    \
  (::llmkern::cpu::selected_isa() == ::llmkern::cpu::Isa::avx512 ? ::llmkern::cpu::avx512::table \
   : ::llmkern::cpu::selected_isa() == ::llmkern::cpu::Isa::avx2 ? ::llmkern::cpu::avx2::table   \
                                                                 : ::llmkern::cpu::baseline::table)
#else
#define LLMKERN_DECLARE_TABLE(Type, table) \
  namespace llmkern::cpu::baseline {       \
  extern const Type table;                 \
  }
#define LLMKERN_SELECT(table) (::llmkern::cpu::baseline::table)
#endif
