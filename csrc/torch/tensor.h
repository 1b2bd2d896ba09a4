// What every binding needs: torch tensors in, raw pointers out.
//
// Bindings trust their caller (llmkern/ops): tensors come in contiguous and of the right shapes; what memory safety
// depends on is checked again here, for whoever calls torch.ops.llmkern_cpu by hand: a wrong call is an error.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/memory.h"

namespace llmkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}
// A literal is no string until it is thrown.
inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      throw std::invalid_argument("expected float32, bfloat16, float16 or float64");
  }
}

inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// Throws what torch does for a tensor whose elements do not lie in its storage, which was resized.
[[noreturn]] void throw_storage_error(const Tensor& t, int64_t storage_bytes);

// What every tensor goes through before its data are touched.
inline void require_contiguous(const Tensor& t, const char* name) {
  if (!t.is_cpu() || !t.is_contiguous())
    throw std::invalid_argument(std::string(name) + ": expected a contiguous CPU tensor");
  int64_t bytes = 0;
  require(aoti_torch_get_storage_size(t.get(), &bytes) == AOTI_TORCH_SUCCESS, "expected a tensor with a storage");
  const int64_t n = t.numel();
  if (n > 0 && (t.storage_offset() + n) * static_cast<int64_t>(t.element_size()) > bytes) throw_storage_error(t, bytes);
}

// Of elements that sums over `dtype` are kept in.
inline ScalarType accum_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Null where there is no tensor.
inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Uninitialised, like `self` but of these sizes; large ones lie in kept memory (core/memory.h).
Tensor empty(const Tensor& self, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype = std::nullopt);

// A result that may not be wanted: then it has no elements, and its pointer is null.
inline Tensor empty_if(bool wanted, const Tensor& self, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return empty(self, wanted ? sizes : std::vector<int64_t>{0}, dtype);
}
inline void* data_if(bool wanted, const Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

}  // namespace llmkern
