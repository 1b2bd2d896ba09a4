#include "core/embedding.h"

#include "torch/table_gradient.h"

namespace llmkern {
namespace {

void check_table(const Tensor& weight, const Tensor& indices) {
  require_contiguous(weight, "weight");
  require(weight.dim() == 2 && indices.dim() == 1, "embedding: expected weight (V, D) and indices (N)");
}

Tensor embedding_forward(const Tensor& weight, const Tensor& indices) {
  check_table(weight, indices);
  const int64_t V = weight.size(0), D = weight.size(1), N = indices.numel();
  Tensor out = empty(weight, {N, D});
  cpu::embedding_forward(weight.const_data_ptr(), dtype_of(weight), V, D, indices_of(indices, "indices"), N,
                         out.mutable_data_ptr());
  return out;
}

cpu::RowOrder order_of(const Tensor& dout, const Tensor& indices, int64_t num_weights) {
  require_contiguous(dout, "dout");
  require(num_weights >= 0, "embedding_backward: expected num_weights that is not negative");
  require(dout.dim() == 2 && indices.dim() == 1 && dout.size(0) == indices.numel(),
          "embedding_backward: expected dout (N, D) and indices (N)");
  return cpu::RowOrder(indices_of(indices, "indices"), indices.numel(), num_weights);
}

cpu::Terms terms_of(const Tensor& dout, const cpu::RowOrder& order) {
  return {.rows = dout.const_data_ptr(),
          .dtype = dtype_of(dout),
          .D = dout.size(1),
          .N = order.positions(),
          .source = order.order()};
}

Tensor embedding_backward(const Tensor& dout, const Tensor& indices, int64_t num_weights, int64_t padding_idx,
                          bool scale_grad_by_freq) {
  const cpu::RowOrder order = order_of(dout, indices, num_weights);
  return dense_gradient(dout, terms_of(dout, order), order, num_weights, padding_idx, scale_grad_by_freq);
}

std::tuple<Tensor, Tensor> embedding_sparse_backward(const Tensor& dout, const Tensor& indices, int64_t num_weights,
                                                     int64_t padding_idx) {
  const cpu::RowOrder order = order_of(dout, indices, num_weights);
  return row_gradient(dout, terms_of(dout, order), order, padding_idx);
}

void embedding_renorm_(Tensor weight, const Tensor& indices, double max_norm, double norm_type) {
  check_table(weight, indices);
  cpu::embedding_renorm(weight.mutable_data_ptr(), dtype_of(weight), weight.size(0), weight.size(1),
                        indices_of(indices, "indices"), indices.numel(), max_norm, norm_type);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def(
      "embedding_sparse_backward(Tensor dout, Tensor indices, int num_weights, int padding_idx)"
      " -> (Tensor rows, Tensor values)");
  m.def("embedding_renorm_(Tensor(a!) weight, Tensor indices, float max_norm, float norm_type) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&embedding_forward));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
  m.impl("embedding_sparse_backward", TORCH_BOX(&embedding_sparse_backward));
  m.impl("embedding_renorm_", TORCH_BOX(&embedding_renorm_));
}

}  // namespace llmkern
