// The length of many tensors taken as one vector, and their scaling: gradient clipping. See grad_norm.cpp.
#pragma once
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

struct Span {
  void* data;
  int64_t n;
  DType dtype;
};

double sum_of_squares(const std::vector<Span>& tensors);
// x *= factor, rounded once.
void scale(const std::vector<Span>& tensors, double factor);

struct GradNormKernels {
  double (*sum_of_squares)(const void* x, int64_t n, DType dtype);
  void (*scale)(void* x, int64_t n, DType dtype, double factor);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(GradNormKernels, grad_norm)
