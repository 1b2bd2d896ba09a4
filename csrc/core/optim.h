// Optimizer steps over many tensors at once. See optim.cpp for the traffic.
#pragma once
#include <vector>

#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// Adam (Kingma and Ba, arXiv 1412.6980) in torch's order of operations; decoupled weight decay makes it AdamW.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

// One parameter, its gradient and its state: n contiguous elements of one dtype each. `step` counts from 1.
struct AdamTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last null without amsgrad
  int64_t n;
  DType dtype;
  double step;
};

void adam_step(const Adam& op, const std::vector<AdamTensor>& tensors);

struct OptimKernels {
  // Elements [begin, end) of one tensor.
  void (*adam)(const Adam& op, const AdamTensor& tensor, int64_t begin, int64_t end);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(OptimKernels, optim)
