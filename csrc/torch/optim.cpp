#include "core/optim.h"

#include "torch/tensor.h"

namespace llmkern {
namespace {

using Tensors = std::vector<Tensor>;

void* matching(const Tensor& t, const Tensor& param, const char* name) {
  require_contiguous(t, name);
  require(t.numel() == param.numel() && t.scalar_type() == param.scalar_type(),
          std::string(name) + ": expected the parameter's number of elements and dtype");
  return t.mutable_data_ptr();
}

void adam_step(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
               std::vector<double> steps, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool decoupled, bool maximize) {
  const size_t n = params.size();
  const bool amsgrad = !max_exp_avg_sqs.empty();
  require(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n &&
              (!amsgrad || max_exp_avg_sqs.size() == n),
          "adam_step: expected as many gradients, states and steps as parameters");
  std::vector<cpu::OptimTensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const Tensor& p = params[i];
    tensors.push_back({matching(p, p, "param"),
                       matching(grads[i], p, "grad"),
                       {matching(exp_avgs[i], p, "exp_avg"), matching(exp_avg_sqs[i], p, "exp_avg_sq"),
                        amsgrad ? matching(max_exp_avg_sqs[i], p, "max_exp_avg_sq") : nullptr},
                       p.numel(),
                       dtype_of(p),
                       dtype_of(p),
                       steps[i]});
  }
  cpu::adam_step({lr, beta1, beta2, eps, weight_decay, decoupled, maximize}, tensors);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def(
      "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] max_exp_avg_sqs, float[] steps, float lr, float beta1, float beta2, float eps,"
      " float weight_decay, bool decoupled, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) { m.impl("adam_step", TORCH_BOX(&adam_step)); }

}  // namespace llmkern
