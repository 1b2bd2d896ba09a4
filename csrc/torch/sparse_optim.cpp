#include "core/sparse_optim.h"

#include <cmath>

#include "core/grad_norm.h"
#include "torch/indices.h"

namespace llmkern {
namespace {

cpu::RowGradient gradient_of(const Tensor& indices, const Tensor& values, int64_t V) {
  const cpu::Indices rows = indices_of(indices, "indices");
  require_contiguous(values, "values");
  require(indices.dim() == 1 && values.dim() == 2 && values.size(0) == indices.numel(),
          "sparse step: expected indices (N) and values (N, D)");
  return {.indices = rows,
          .values = values.const_data_ptr(),
          .N = indices.numel(),
          .V = V,
          .D = values.size(1),
          .dtype = dtype_of(values)};
}

// States of one dtype: the parameter's, or the one that arithmetic is done in.
template <class Op>
void step(const Op& op, const Tensor& param, const Tensor& indices, const Tensor& values,
          std::initializer_list<const Tensor*> states, double count) {
  require_contiguous(param, "param");
  require(param.dim() == 2 && values.dim() == 2 && param.size(1) == values.size(1) &&
              param.scalar_type() == values.scalar_type(),
          "sparse step: expected param (V, D) and values (N, D) of its dtype");
  const DType dtype = dtype_of(param), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  constexpr bool rowwise = std::is_same_v<Op, cpu::RowWiseAdagrad>;
  cpu::OptimTable table{.param = param.mutable_data_ptr(), .states = {}, .state_dtype = dtype, .step = count};
  int k = 0;
  for (const Tensor* state : states) {
    require_contiguous(*state, "state");
    table.state_dtype = dtype_of(**states.begin());
    require(state->numel() == (rowwise ? param.size(0) : param.numel()) && dtype_of(*state) == table.state_dtype &&
                (table.state_dtype == wide || (table.state_dtype == dtype && !rowwise)),
            "state: expected one of the parameter's shape and dtype, or float32 (float64 for float64); row-wise, a"
            " number for each row");
    table.states[k++] = state->mutable_data_ptr();
  }
  cpu::sparse_step(op, gradient_of(indices, values, param.size(0)), table);
}

void sparse_sgd_step(Tensor param, Tensor indices, Tensor values, double lr, bool maximize, double grad_scale) {
  step(cpu::Sgd{.lr = lr,
                .momentum = 0,
                .dampening = 0,
                .weight_decay = 0,
                .nesterov = false,
                .maximize = maximize,
                .grad_scale = grad_scale},
       param, indices, values, {}, 1);
}

void sparse_adagrad_step(Tensor param, Tensor indices, Tensor values, Tensor sum, double count, double lr,
                         double lr_decay, double eps, bool maximize, double grad_scale) {
  step(cpu::Adagrad{.lr = lr,
                    .lr_decay = lr_decay,
                    .weight_decay = 0,
                    .eps = eps,
                    .maximize = maximize,
                    .grad_scale = grad_scale},
       param, indices, values, {&sum}, count);
}

void sparse_adam_step(Tensor param, Tensor indices, Tensor values, Tensor exp_avg, Tensor exp_avg_sq, double count,
                      double lr, double beta1, double beta2, double eps, bool maximize, double grad_scale) {
  const double step_size = lr * std::sqrt(1 - std::pow(beta2, count)) / (1 - std::pow(beta1, count));
  step(cpu::SparseAdam{.step_size = step_size,
                       .beta1 = beta1,
                       .beta2 = beta2,
                       .eps = eps,
                       .maximize = maximize,
                       .grad_scale = grad_scale},
       param, indices, values, {&exp_avg, &exp_avg_sq}, count);
}

void rowwise_adagrad_step(Tensor param, Tensor indices, Tensor values, Tensor sum, double lr, double eps, bool maximize,
                          double grad_scale) {
  step(cpu::RowWiseAdagrad{.lr = lr, .eps = eps, .maximize = maximize, .grad_scale = grad_scale}, param, indices,
       values, {&sum}, 1);
}

Tensor sparse_grad_norm(Tensor indices, Tensor values, int64_t num_rows) {
  const cpu::RowGradient grad = gradient_of(indices, values, num_rows);
  Tensor norm = empty(values, {}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(cpu::sparse_sum_of_squares(grad));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("sparse_sgd_step", TORCH_BOX(&sparse_sgd_step));
  m.impl("sparse_adagrad_step", TORCH_BOX(&sparse_adagrad_step));
  m.impl("sparse_adam_step", TORCH_BOX(&sparse_adam_step));
  m.impl("rowwise_adagrad_step", TORCH_BOX(&rowwise_adagrad_step));
  m.impl("sparse_grad_norm", TORCH_BOX(&sparse_grad_norm));
}

}  // namespace llmkern
