// Optimizer steps over many tensors at once. See optim.cpp for the traffic, isa/optim_rules.h for the arithmetic.
#pragma once
#include <vector>

#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// Gradients are multiplied by `grad_scale` as they are read, so that unscaling and clipping cost no pass of their own.
// What becomes of the gradients themselves: nothing, zeros, or what was stepped by (but for the sign of `maximize`).
enum class After { keep, zero, scale };

// Adam (Kingma and Ba, arXiv 1412.6980) in torch's order of operations; decoupled weight decay makes it AdamW.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
  double grad_scale = 1;
  After after = After::keep;
};

struct Sgd {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  double grad_scale = 1;
  After after = After::keep;
};

struct Adagrad {
  double lr, lr_decay, weight_decay, eps;
  bool maximize;
  double grad_scale = 1;
  After after = After::keep;
};

// torch's SparseAdam: Adam on the rows that have a gradient, with eps added before the bias is corrected.
struct SparseAdam {
  double step_size;  // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  double beta1, beta2, eps;
  bool maximize;
  double grad_scale = 1;
};

// One parameter, its gradient and its states: n contiguous elements each. The gradient has the parameter's dtype; the
// states have that too, or the one that arithmetic is done in. `step` counts from 1.
struct OptimTensor {
  void* param;
  void* grad;
  // Adam: exp_avg, exp_avg_sq, max_exp_avg_sq (null: no amsgrad). Sgd: momentum buffer (written by step 1, null: no
  // momentum). Adagrad: sum.
  void* states[3];
  int64_t n;
  DType dtype, state_dtype;
  double step;
};

void adam_step(const Adam& op, const std::vector<OptimTensor>& tensors);
void sgd_step(const Sgd& op, const std::vector<OptimTensor>& tensors);
void adagrad_step(const Adagrad& op, const std::vector<OptimTensor>& tensors);

// Elements [begin, end) of one tensor.
template <class Op>
using OptimKernel = void (*)(const Op& op, const OptimTensor& tensor, int64_t begin, int64_t end);

struct OptimKernels {
  OptimKernel<Adam> adam;
  OptimKernel<Sgd> sgd;
  OptimKernel<Adagrad> adagrad;
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(OptimKernels, optim)
