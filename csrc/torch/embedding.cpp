#include "core/embedding.h"

#include "torch/tensor.h"

namespace llmkern {
namespace {

cpu::Indices indices_of(const Tensor& t) {
  require_contiguous(t, "indices");
  const bool is_int64 = t.scalar_type() == ScalarType::Long;
  require(is_int64 || t.scalar_type() == ScalarType::Int, "indices: expected int32 or int64");
  return {t.const_data_ptr(), is_int64};
}

Tensor embedding_forward(const Tensor& weight, const Tensor& indices) {
  require_contiguous(weight, "weight");
  require(weight.dim() == 2 && indices.dim() == 1, "embedding_forward: expected weight (V, D) and indices (N)");
  const int64_t V = weight.size(0), D = weight.size(1), N = indices.numel();
  Tensor out = empty(weight, {N, D});
  cpu::embedding_forward(weight.const_data_ptr(), dtype_of(weight), V, D, indices_of(indices), N,
                         out.mutable_data_ptr());
  return out;
}

Tensor embedding_backward(const Tensor& dout, const Tensor& indices, int64_t num_weights, int64_t padding_idx,
                          bool scale_grad_by_freq) {
  require_contiguous(dout, "dout");
  require(dout.dim() == 2 && indices.dim() == 1 && dout.size(0) == indices.numel(),
          "embedding_backward: expected dout (N, D) and indices (N)");
  const int64_t D = dout.size(1);
  Tensor dweight = empty(dout, {num_weights, D});
  cpu::embedding_backward(dout.const_data_ptr(), dtype_of(dout), num_weights, D, indices_of(indices), indices.numel(),
                          padding_idx, scale_grad_by_freq, dweight.mutable_data_ptr());
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def("embedding_forward(Tensor weight, Tensor indices) -> Tensor");
  m.def(
      "embedding_backward(Tensor dout, Tensor indices, int num_weights, int padding_idx, bool scale_grad_by_freq)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&embedding_forward));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
}

}  // namespace llmkern
