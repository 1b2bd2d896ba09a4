#include "core/optim.h"

#include "torch/tensor.h"

namespace llmkern {
namespace {

using Tensors = std::vector<Tensor>;

void* matching(const Tensor& t, int64_t n, ScalarType dtype, const char* name) {
  require_contiguous(t, name);
  if (t.numel() != n || t.scalar_type() != dtype)
    throw std::invalid_argument(std::string(name) +
                                ": expected the parameter's number of elements, and its dtype or the states'");
  return t.mutable_data_ptr();
}

// The states' dtype: the parameter's, or the one that arithmetic on it is done in.
ScalarType state_type_of(const Tensor& state, ScalarType param) {
  const ScalarType type = state.scalar_type(), wide = param == ScalarType::Double ? param : ScalarType::Float;
  require(type == param || type == wide, "state: expected the parameter's dtype, or float32 (float64 for float64)");
  return type;
}

// `states`: lists that are empty or as long as `params`, the first of them if there are states at all.
std::vector<cpu::OptimTensor> gather(const Tensors& params, const Tensors& grads,
                                     std::initializer_list<const Tensors*> states, const std::vector<double>& steps) {
  const size_t n = params.size();
  const Tensors& first = **states.begin();
  bool complete = grads.size() == n && steps.size() == n;
  for (const Tensors* state : states) complete = complete && (state->empty() || state->size() == n);
  require(complete, "optimizer step: expected as many gradients, states and steps as parameters");
  std::vector<cpu::OptimTensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const int64_t numel = params[i].numel();
    const ScalarType type = params[i].scalar_type();
    const ScalarType state_type = first.empty() ? type : state_type_of(first[i], type);
    cpu::OptimTensor& tensor = tensors.emplace_back();
    tensor.param = matching(params[i], numel, type, "param");
    tensor.grad = matching(grads[i], numel, type, "grad");
    void** state_at = tensor.states;
    for (const Tensors* state : states)
      *state_at++ = state->empty() ? nullptr : matching((*state)[i], numel, state_type, "state");
    tensor.n = numel;
    tensor.dtype = dtype_of(type);
    tensor.state_dtype = dtype_of(state_type);
    tensor.step = steps[i];
  }
  return tensors;
}

// Counts one step more in each, and gives the counts.
std::vector<double> advance(Tensors steps) {
  std::vector<double> counts;
  for (const Tensor& step : steps) {
    require_contiguous(step, "steps");
    require(step.numel() == 1, "steps: expected tensors of one element");
    const DType dtype = dtype_of(step);
    require(dtype == DType::f32 || dtype == DType::f64, "steps: expected float32 or float64");
    void* const at = step.mutable_data_ptr();
    counts.push_back(dtype == DType::f32 ? *static_cast<float*>(at) += 1 : *static_cast<double*>(at) += 1);
  }
  return counts;
}

cpu::After after_of(const std::string& after) {
  if (after == "keep") return cpu::After::keep;
  if (after == "zero") return cpu::After::zero;
  require(after == "scale", "after: expected keep, zero or scale");
  return cpu::After::scale;
}

void adam_step(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
               std::vector<double> steps, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool decoupled, bool maximize, double grad_scale, std::string after) {
  require(exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(),
          "adam_step: expected as many exp_avgs and exp_avg_sqs as parameters");
  const auto tensors = gather(params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, steps);
  cpu::adam_step({.lr = lr,
                  .beta1 = beta1,
                  .beta2 = beta2,
                  .eps = eps,
                  .weight_decay = weight_decay,
                  .decoupled = decoupled,
                  .maximize = maximize,
                  .grad_scale = grad_scale,
                  .after = after_of(after)},
                 tensors);
}

void sgd_step(Tensors params, Tensors grads, Tensors momentum_buffers, std::vector<double> steps, double lr,
              double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, double grad_scale,
              std::string after) {
  const auto tensors = gather(params, grads, {&momentum_buffers}, steps);
  cpu::sgd_step({.lr = lr,
                 .momentum = momentum,
                 .dampening = dampening,
                 .weight_decay = weight_decay,
                 .nesterov = nesterov,
                 .maximize = maximize,
                 .grad_scale = grad_scale,
                 .after = after_of(after)},
                tensors);
}

void adagrad_step(Tensors params, Tensors grads, Tensors sums, std::vector<double> steps, double lr, double lr_decay,
                  double weight_decay, double eps, bool maximize, double grad_scale, std::string after) {
  require(sums.size() == params.size(), "adagrad_step: expected as many sums as parameters");
  const auto tensors = gather(params, grads, {&sums}, steps);
  cpu::adagrad_step({.lr = lr,
                     .lr_decay = lr_decay,
                     .weight_decay = weight_decay,
                     .eps = eps,
                     .maximize = maximize,
                     .grad_scale = grad_scale,
                     .after = after_of(after)},
                    tensors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("advance", TORCH_BOX(&advance));
  m.impl("adam_step", TORCH_BOX(&adam_step));
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
  m.impl("adagrad_step", TORCH_BOX(&adagrad_step));
}

}  // namespace llmkern
