// What this machine can do, measured: the denominators of every roofline. See probe.cpp.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// Giga-FLOPs per second of fused multiply-adds (bf16: of dot products) on all threads, from registers alone;
// the best of several slices of about `seconds` in all. Throws std::invalid_argument where the CPU has no
// such instruction.
double peak_flops(DType dtype, double seconds);

enum class Traffic { read, copy, stream };  // stream: stores past the caches

// Gigabytes per second on all threads over memory that no cache holds. A copy counts what it reads and what
// it writes.
double peak_bandwidth(Traffic traffic, double seconds);

struct ProbeKernels {
  // `rounds` of FMAs on as many chains as hide their latency; returns the FLOPs of one round. `sink` keeps
  // them alive.
  int64_t (*fma_f32)(int64_t rounds, float* sink);
  int64_t (*fma_f64)(int64_t rounds, double* sink);
  int64_t (*dot_bf16)(int64_t rounds, float* sink);  // null where the instruction set has none
  // n is a multiple of 64; both pointers are aligned to 64.
  uint64_t (*read)(const char* from, int64_t n);
  void (*stream)(char* to, int64_t n);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(ProbeKernels, probe)
