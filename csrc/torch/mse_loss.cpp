#include "core/mse_loss.h"

#include <tuple>

#include "torch/tensor.h"

namespace llmkern {
namespace {

void check(const Tensor& input, const Tensor& target) {
  require_contiguous(input, "input"), require_contiguous(target, "target");
  require(input.numel() == target.numel() && input.scalar_type() == target.scalar_type(),
          "mse_loss: expected input and target of one shape and dtype");
}

// What sums of `t` are kept in.
bool sums_in_f64(const Tensor& t) { return dtype_of(t) == DType::f64; }

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

Tensor mse_loss_forward(const Tensor& input, const Tensor& target, bool reduce) {
  check(input, target);
  const void *x = input.const_data_ptr(), *t = target.const_data_ptr();
  if (!reduce) {
    Tensor out = empty(input, sizes_of(input));
    cpu::mse_loss_forward(x, t, dtype_of(input), input.numel(), out.mutable_data_ptr());
    return out;
  }
  Tensor out = empty(input, {}, sums_in_f64(input) ? ScalarType::Double : ScalarType::Float);
  const double sum = cpu::mse_loss_forward_sum(x, t, dtype_of(input), input.numel());
  if (sums_in_f64(input))
    *static_cast<double*>(out.mutable_data_ptr()) = sum;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(sum);
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_backward(const Tensor& dloss, const Tensor& input, const Tensor& target,
                                             bool reduce, bool need_input, bool need_target) {
  check(input, target);
  require_contiguous(dloss, "dloss");
  double dsum = 0;
  if (reduce) {
    require(dloss.numel() == 1 && dloss.scalar_type() == (sums_in_f64(input) ? ScalarType::Double : ScalarType::Float),
            "mse_loss_backward: expected dloss (), float32 or, for float64 input, float64");
    dsum = sums_in_f64(input) ? *static_cast<const double*>(dloss.const_data_ptr())
                              : *static_cast<const float*>(dloss.const_data_ptr());
  } else {
    check(input, dloss);
  }
  const std::vector<int64_t> sizes = sizes_of(input), none{0};
  Tensor dinput = empty(input, need_input ? sizes : none), dtarget = empty(input, need_target ? sizes : none);
  cpu::mse_loss_backward(reduce ? nullptr : dloss.const_data_ptr(), dsum, input.const_data_ptr(),
                         target.const_data_ptr(), dtype_of(input), input.numel(),
                         need_input ? dinput.mutable_data_ptr() : nullptr,
                         need_target ? dtarget.mutable_data_ptr() : nullptr);
  return {dinput, dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def("mse_loss_forward(Tensor input, Tensor target, bool reduce) -> Tensor");
  m.def(
      "mse_loss_backward(Tensor dloss, Tensor input, Tensor target, bool reduce, bool need_input, bool "
      "need_target)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("mse_loss_forward", TORCH_BOX(&mse_loss_forward));
  m.impl("mse_loss_backward", TORCH_BOX(&mse_loss_backward));
}

}  // namespace llmkern
