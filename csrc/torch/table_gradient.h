// Gradients of tables as tensors: dense, or the rows that occur.
#pragma once
#include <tuple>

#include "core/row_order.h"
#include "core/table_gradient.h"
#include "torch/indices.h"
#include "torch/tensor.h"

namespace llmkern {

// (V, D), like dout.
inline Tensor dense_gradient(const Tensor& dout, const cpu::Terms& terms, const cpu::RowOrder& order, int64_t V,
                             int64_t padding_idx, bool scale_grad_by_freq) {
  Tensor dweight = empty(dout, {V, terms.D});
  cpu::table_gradient(terms, order, V, padding_idx, scale_grad_by_freq, dweight.mutable_data_ptr());
  return dweight;
}

// rows (R), int64, and values (R, D), like dout.
inline std::tuple<Tensor, Tensor> row_gradient(const Tensor& dout, const cpu::Terms& terms, const cpu::RowOrder& order,
                                               int64_t padding_idx) {
  const int64_t R = cpu::table_gradient_rows(order, padding_idx);
  Tensor rows = empty(dout, {R}, ScalarType::Long), values = empty(dout, {R, terms.D});
  cpu::table_gradient_compact(terms, order, padding_idx, static_cast<int64_t*>(rows.mutable_data_ptr()),
                              values.mutable_data_ptr());
  return {rows, values};
}

}  // namespace llmkern
