// Tensors of row numbers.
#pragma once
#include "core/indices.h"
#include "torch/tensor.h"

namespace llmkern {

inline cpu::Indices indices_of(const Tensor& t, const char* name) {
  require_contiguous(t, name);
  const bool is_int64 = t.scalar_type() == ScalarType::Long;
  require(is_int64 || t.scalar_type() == ScalarType::Int, std::string(name) + ": expected int32 or int64");
  return {.data = t.const_data_ptr(), .is_int64 = is_int64};
}

}  // namespace llmkern
