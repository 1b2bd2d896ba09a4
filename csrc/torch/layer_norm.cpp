#include "core/layer_norm.h"

#include <tuple>

#include "torch/tensor.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

const void* row(const Optional& t, const Tensor& x, const char* name) {
  if (!t) return nullptr;
  require_contiguous(*t, name);
  const bool half = itemsize(dtype_of(x)) == 2;
  require(t->dim() == 1 && t->size(0) == x.size(1), std::string("layer_norm: expected ") + name + " (D)");
  require(t->scalar_type() == x.scalar_type() || (half && t->scalar_type() == ScalarType::Float),
          std::string("layer_norm: expected ") + name + " of x's dtype, or float32 where x has half of it");
  return t->const_data_ptr();
}

cpu::LayerNorm problem(const Tensor& x, const Optional& weight, const Optional& bias, double eps, bool rms) {
  require_contiguous(x, "x");
  require(x.dim() == 2, "layer_norm: expected x (N, D)");
  require(!(weight && bias) || weight->scalar_type() == bias->scalar_type(),
          "layer_norm: expected weight and bias of one dtype");
  const Optional& affine = weight ? weight : bias;
  return {.dtype = dtype_of(x),
          .affine = affine ? dtype_of(*affine) : dtype_of(x),
          .N = x.size(0),
          .D = x.size(1),
          .x = x.const_data_ptr(),
          .weight = row(weight, x, "weight"),
          .bias = row(bias, x, "bias"),
          .eps = eps,
          .rms = rms};
}

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& x, Optional weight, Optional bias, double eps, bool rms) {
  const cpu::LayerNorm op = problem(x, weight, bias, eps, rms);
  Tensor y = empty(x, {op.N, op.D});
  Tensor stats = empty(x, {op.N, 2}, accum_type(dtype_of(x)));
  cpu::layer_norm_forward(op, y.mutable_data_ptr(), stats.mutable_data_ptr());
  return {y, stats};
}

// The k-th gradient is empty unless bit k of `wants` is set.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& stats,
                                                       Optional weight, Optional bias, double eps, bool rms,
                                                       int64_t wants) {
  const cpu::LayerNorm op = problem(x, weight, bias, eps, rms);
  require_contiguous(dy, "dy");
  require(dy.dim() == 2 && dy.size(0) == op.N && dy.size(1) == op.D && dy.scalar_type() == x.scalar_type(),
          "layer_norm: expected dy of x's shape and dtype");
  require_contiguous(stats, "stats");
  require(stats.numel() == 2 * op.N && stats.scalar_type() == accum_type(dtype_of(x)),
          "layer_norm: expected stats (N, 2), as the forward gave it");
  const bool learns[] = {weight && (wants & 2), bias && (wants & 4)};
  Tensor dx = empty_if(wants & 1, x, {op.N, op.D});
  Tensor dweight = empty(weight ? *weight : x, {learns[0] ? op.D : 0});
  Tensor dbias = empty(bias ? *bias : x, {learns[1] ? op.D : 0});
  cpu::layer_norm_backward(
      op, dy.const_data_ptr(), stats.const_data_ptr(),
      {.x = data_if(wants & 1, dx), .weight = data_if(learns[0], dweight), .bias = data_if(learns[1], dbias)});
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace llmkern
