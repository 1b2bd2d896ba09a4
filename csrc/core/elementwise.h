// The functions of core/isa/simd.h over arrays: what the tests measure the kernels' exp, sigmoid and tanh by.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

enum class Unary { exp, exp_negative, sigmoid, tanh, copy };

struct ElementwiseKernels {
  // y[i] = f(x[i]), i < n, both of dtype; copy goes through the arithmetic type and back.
  void (*apply)(Unary f, const void* x, int64_t n, DType dtype, void* y);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(ElementwiseKernels, elementwise)
