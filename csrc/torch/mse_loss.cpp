#include "core/mse_loss.h"

#include <tuple>

#include "torch/tensor.h"

namespace llmkern {
namespace {

void check(const Tensor& input, const Tensor& target) {
  require_contiguous(input, "input");
  require_contiguous(target, "target");
  require(input.numel() == target.numel() && input.scalar_type() == target.scalar_type(),
          "mse_loss: expected input and target of one shape and dtype");
}

// A gradient of the sum, as the kernels take it.
double scalar(const Tensor& t, const Tensor& input, const char* name) {
  require_contiguous(t, name);
  const bool wide = dtype_of(input) == DType::f64;
  require(t.numel() == 1 && t.scalar_type() == accum_type(dtype_of(input)),
          std::string("mse_loss: expected ") + name + " (), float32 or, for float64 input, float64");
  return wide ? *static_cast<const double*>(t.const_data_ptr()) : *static_cast<const float*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> mse_loss_forward(const Tensor& input, const Tensor& target, bool reduce,
                                                    std::optional<Tensor> scale, bool need_input, bool need_target) {
  check(input, target);
  require(!(need_input || need_target) || (reduce && scale), "mse_loss: gradients need a sum and its scale");
  const void *x = input.const_data_ptr(), *t = target.const_data_ptr();
  Tensor dinput = empty_if(need_input, input, sizes_of(input));
  Tensor dtarget = empty_if(need_target, input, sizes_of(input));
  if (!reduce) {
    Tensor out = empty(input, sizes_of(input));
    cpu::mse_loss_forward(x, t, dtype_of(input), input.numel(), out.mutable_data_ptr());
    return {out, dinput, dtarget};
  }
  const double dsum = scale ? scalar(*scale, input, "scale") : 0;
  Tensor out = empty(input, {}, accum_type(dtype_of(input)));
  const double sum = cpu::mse_loss_forward_sum(x, t, dtype_of(input), input.numel(), dsum, data_if(need_input, dinput),
                                               data_if(need_target, dtarget));
  if (dtype_of(input) == DType::f64)
    *static_cast<double*>(out.mutable_data_ptr()) = sum;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(sum);
  return {out, dinput, dtarget};
}

std::tuple<Tensor, Tensor> mse_loss_backward(const Tensor& dloss, const Tensor& input, const Tensor& target,
                                             bool reduce, bool need_input, bool need_target) {
  check(input, target);
  if (!reduce) check(input, dloss);
  const double dsum = reduce ? scalar(dloss, input, "dloss") : 0;
  Tensor dinput = empty_if(need_input, input, sizes_of(input));
  Tensor dtarget = empty_if(need_target, input, sizes_of(input));
  cpu::mse_loss_backward(reduce ? nullptr : dloss.const_data_ptr(), dsum, input.const_data_ptr(),
                         target.const_data_ptr(), dtype_of(input), input.numel(), data_if(need_input, dinput),
                         data_if(need_target, dtarget));
  return {dinput, dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("mse_loss_forward", TORCH_BOX(&mse_loss_forward));
  m.impl("mse_loss_backward", TORCH_BOX(&mse_loss_backward));
}

}  // namespace llmkern
