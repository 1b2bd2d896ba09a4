#include "core/grad_norm.h"

#include <cmath>

#include "torch/tensor.h"

namespace llmkern {
namespace {

std::vector<cpu::Span> spans(const std::vector<Tensor>& tensors) {
  std::vector<cpu::Span> result;
  for (const Tensor& t : tensors) {
    require_contiguous(t, "tensors");
    result.push_back({.data = t.mutable_data_ptr(), .n = t.numel(), .dtype = dtype_of(t)});
  }
  return result;
}

Tensor grad_norm(std::vector<Tensor> tensors) {
  require(!tensors.empty(), "grad_norm: expected at least one tensor");
  Tensor norm = empty(tensors[0], {}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(cpu::sum_of_squares(spans(tensors)));
  return norm;
}

void scale_(std::vector<Tensor> tensors, const Tensor& factor) {
  require_contiguous(factor, "factor");
  require(factor.numel() == 1 && factor.scalar_type() == ScalarType::Double, "scale_: expected a float64 scalar");
  cpu::scale(spans(tensors), *static_cast<const double*>(factor.const_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace llmkern
