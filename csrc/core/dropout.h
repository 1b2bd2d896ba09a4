// Dropout. See dropout.cpp for the idea.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// y (n) = x / (1 - p) where it is kept, else 0; an element is dropped with probability p, by seed and index. p = 1
// drops all.
void dropout(const void* x, DType dtype, int64_t n, double p, uint64_t seed, void* y);

struct DropoutKernels {
  // Elements [begin, end) of the whole.
  void (*dropout)(const void* x, DType dtype, int64_t begin, int64_t end, double p, uint64_t seed, void* y);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(DropoutKernels, dropout)
