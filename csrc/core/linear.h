// A linear layer. See linear.cpp for the FLOPs.
#pragma once
#include "core/dtype.h"
#include "core/memory.h"

namespace llmkern::cpu {

// A bias as sums start from it: as it is, or low precision in fp32. `bias` may be null.
class WideBias {
 public:
  WideBias(const void* bias, DType dtype, int64_t n);
  const void* get() const { return data_; }

 private:
  Buffer<float> wide_;
  const void* data_;
};

// y (N, O) = x (N, I) weight (O, I)^T + bias (O), all contiguous and of one dtype; bias may be null.
void linear_forward(const void* x, const void* weight, const void* bias, DType dtype, int64_t N, int64_t I, int64_t O,
                    void* y);

// dx (N, I) = dy weight and dweight (O, I) = dy^T x; either may be null.
void linear_backward(const void* dy, const void* x, const void* weight, DType dtype, int64_t N, int64_t I, int64_t O,
                     void* dx, void* dweight);

}  // namespace llmkern::cpu
