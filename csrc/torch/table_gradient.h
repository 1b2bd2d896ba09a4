// Gradients of tables as tensors: dense, or the rows that occur. Indices.
#pragma once
#include <tuple>

#include "core/indices.h"
#include "core/row_order.h"
#include "core/table_gradient.h"
#include "torch/tensor.h"

namespace llmkern {

inline cpu::Indices indices_of(const Tensor& t, const char* name) {
  require_contiguous(t, name);
  const bool is_int64 = t.scalar_type() == ScalarType::Long;
  require(is_int64 || t.scalar_type() == ScalarType::Int, std::string(name) + ": expected int32 or int64");
  return {t.const_data_ptr(), is_int64};
}

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
