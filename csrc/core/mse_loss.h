// Squared error. See mse_loss.cpp for the idea and the traffic.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// The sum of (input[i] - target[i])^2 over i < N. In the same pass, where they are not null, dinput and dtarget become,
// bit for bit, what mse_loss_backward makes of dsum.
double mse_loss_forward_sum(const void* input, const void* target, DType dtype, int64_t N, double dsum, void* dinput,
                            void* dtarget);

// out[i] = (input[i] - target[i])^2.
void mse_loss_forward(const void* input, const void* target, DType dtype, int64_t N, void* out);

// dinput[i] = 2 * (input[i] - target[i]) * g and dtarget[i] = -dinput[i]; either may be null.
// g is dloss[i], of `dtype`, or, with dloss null, dsum for every i.
void mse_loss_backward(const void* dloss, double dsum, const void* input, const void* target, DType dtype, int64_t N,
                       void* dinput, void* dtarget);

// The same on one range of elements. `stream`: gradients go past the caches.
struct MseLossKernels {
  double (*sum)(const void* input, const void* target, DType dtype, int64_t n, double dsum, void* dinput, void* dtarget,
                bool stream);
  void (*forward)(const void* input, const void* target, DType dtype, int64_t n, void* out);
  void (*backward)(const void* dloss, double dsum, const void* input, const void* target, DType dtype, int64_t n,
                   void* dinput, void* dtarget, bool stream);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(MseLossKernels, mse_loss)
