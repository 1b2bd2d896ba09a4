// A linear layer. See linear.cpp for the FLOPs.
#pragma once
#include "core/dtype.h"

namespace llmkern::cpu {

// y (N, O) = x (N, I) weight (O, I)^T + bias (O), all contiguous and of one dtype; bias may be null.
void linear_forward(const void* x, const void* weight, const void* bias, DType dtype, int64_t N, int64_t I, int64_t O,
                    void* y);

// dx (N, I) = dy weight and dweight (O, I) = dy^T x; either may be null.
void linear_backward(const void* dy, const void* x, const void* weight, DType dtype, int64_t N, int64_t I, int64_t O,
                     void* dx, void* dweight);

}  // namespace llmkern::cpu
