#include "core/linear.h"

#include <tuple>

#include "torch/tensor.h"

namespace llmkern {
namespace {

void check(const Tensor& x, const Tensor& weight) {
  require_contiguous(x, "x");
  require_contiguous(weight, "weight");
  require(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.scalar_type() == weight.scalar_type(),
          "linear: expected x (N, I) and weight (O, I) of one dtype");
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  check(x, weight);
  const int64_t N = x.size(0), I = x.size(1), O = weight.size(0);
  if (bias) {
    require_contiguous(*bias, "bias");
    require(bias->dim() == 1 && bias->numel() == O && bias->scalar_type() == x.scalar_type(),
            "linear: expected bias (O) of the dtype of x");
  }
  Tensor y = empty(x, {N, O});
  cpu::linear_forward(x.const_data_ptr(), weight.const_data_ptr(), data_of(bias), dtype_of(x), N, I, O,
                      y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_x,
                                           bool need_weight) {
  check(x, weight);
  const int64_t N = x.size(0), I = x.size(1), O = weight.size(0);
  require_contiguous(dy, "dy");
  require(dy.dim() == 2 && dy.size(0) == N && dy.size(1) == O && dy.scalar_type() == x.scalar_type(),
          "linear_backward: expected dy (N, O) of the dtype of x");
  Tensor dx = empty_if(need_x, x, {N, I}), dweight = empty_if(need_weight, x, {O, I});
  cpu::linear_backward(dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(), dtype_of(x), N, I, O,
                       data_if(need_x, dx), data_if(need_weight, dweight));
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace llmkern
