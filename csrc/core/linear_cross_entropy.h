// Linear layer and cross-entropy as one. See linear_cross_entropy.cpp for the idea and the FLOPs.
#pragma once
#include "core/cross_entropy.h"

namespace llmkern::cpu {

struct LinearCrossEntropy {
  CrossEntropy loss;  // N rows of V classes; D is 1, and dtype is what logits are in: f32, or f64
  int64_t H;
  DType dtype;                // of x, linear_weight and linear_bias, and of their gradients
  const void* x;              // (N, H)
  const void* linear_weight;  // (V, H)
  const void* linear_bias;    // (V), or null
  int64_t workspace;          // bytes that logits may take, whose place their gradients take; a row at least
};

// Gradients for the cotangents; null where not wanted. dtarget (N, V) is of the target's dtype.
struct LinearCrossEntropyGradients {
  void *dx, *dlinear_weight, *dlinear_bias, *dtarget;
};

// As cross_entropy (core/cross_entropy.h), for logits = x linear_weight^T + linear_bias.
void linear_cross_entropy(const LinearCrossEntropy& op, const CrossEntropyOutputs& outputs,
                          const CrossEntropyCotangents& cotangents, const LinearCrossEntropyGradients& gradients);

}  // namespace llmkern::cpu
