#include "core/quantized_embedding.h"

#include <tuple>

#include "torch/indices.h"

namespace llmkern {
namespace {

void check_bits(int64_t bits) { require(bits == 8 || bits == 4, "bits: expected 8 or 4, got " + std::to_string(bits)); }

std::tuple<Tensor, Tensor, Tensor> quantized_embedding_quantize(const Tensor& weight, int64_t bits) {
  require_contiguous(weight, "weight");
  check_bits(bits);
  require(weight.dim() == 2, "quantized_embedding_quantize: expected weight (V, D)");
  const int64_t V = weight.size(0), D = weight.size(1);
  Tensor data = torch::stable::new_empty(weight, {V, bits == 8 ? D : (D + 1) / 2}, ScalarType::Byte);
  Tensor scale = empty(weight, {V}, ScalarType::Float), offset = empty(weight, {V}, ScalarType::Float);
  cpu::quantize_rows(weight.const_data_ptr(), dtype_of(weight), V, D, static_cast<int>(bits),
                     static_cast<uint8_t*>(data.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()),
                     static_cast<float*>(offset.mutable_data_ptr()));
  return {data, scale, offset};
}

Tensor quantized_embedding_forward(const Tensor& weight, const Tensor& scale, const Tensor& offset,
                                   const Tensor& indices, int64_t embedding_dim, int64_t bits, ScalarType dtype) {
  require_contiguous(weight, "weight");
  require_contiguous(scale, "scale");
  require_contiguous(offset, "offset");
  check_bits(bits);
  require(weight.dim() == 2 && weight.scalar_type() == ScalarType::Byte && embedding_dim >= 0 &&
              weight.size(1) == (bits == 8 ? embedding_dim : (embedding_dim + 1) / 2),
          "weight: expected uint8 (V, D), or (V, ceil(D / 2)) for 4 bits");
  const int64_t V = weight.size(0);
  require(scale.numel() == V && offset.numel() == V && scale.scalar_type() == ScalarType::Float &&
              offset.scalar_type() == ScalarType::Float,
          "scale, offset: expected float32 (V)");
  require(indices.dim() == 1, "indices: expected (N)");
  Tensor out = empty(scale, {indices.numel(), embedding_dim}, dtype);
  cpu::quantized_embedding_forward({.data = static_cast<const uint8_t*>(weight.const_data_ptr()),
                                    .scale = static_cast<const float*>(scale.const_data_ptr()),
                                    .offset = static_cast<const float*>(offset.const_data_ptr()),
                                    .V = V,
                                    .D = embedding_dim,
                                    .bits = static_cast<int>(bits)},
                                   indices_of(indices, "indices"), indices.numel(), dtype_of(dtype),
                                   out.mutable_data_ptr());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("quantized_embedding_quantize", TORCH_BOX(&quantized_embedding_quantize));
  m.impl("quantized_embedding_forward", TORCH_BOX(&quantized_embedding_forward));
}

}  // namespace llmkern
