// What the bindings of cross_entropy and linear_cross_entropy share.
#pragma once
#include "core/cross_entropy.h"
#include "torch/tensor.h"

namespace llmkern {

struct CrossEntropyOptions {
  CrossEntropyOptions(int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double logit_scale)
      : ignore_index(ignore_index),
        label_smoothing(label_smoothing),
        z_loss(z_loss),
        softcap(softcap),
        logit_scale(logit_scale) {}
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;
};

// For logits (N, V, D) of `dtype`: checks target (indices or probabilities) and weight.
cpu::CrossEntropy describe(DType dtype, int64_t N, int64_t V, int64_t D, const Tensor& target,
                           const std::optional<Tensor>& weight, const CrossEntropyOptions& options);

// The data of a tensor with an element in Accum for every row, or null.
const void* rows_of(const std::optional<Tensor>& t, const cpu::CrossEntropy& op, const char* name);

// Tensors for the outputs; those not wanted are empty.
struct CrossEntropyResults {
  Tensor loss, lse, entropy, argmax;
  cpu::CrossEntropyOutputs outputs;

  CrossEntropyResults(const Tensor& like, const std::vector<int64_t>& sizes, DType dtype, bool entropy, bool argmax);
};

}  // namespace llmkern
