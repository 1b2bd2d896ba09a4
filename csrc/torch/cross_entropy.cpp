#include "core/cross_entropy.h"

#include <tuple>

#include "torch/tensor.h"

namespace llmkern {
namespace {

cpu::CrossEntropy describe(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                           int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                           double logit_scale) {
  require_contiguous(logits, "logits"), require_contiguous(target, "target");
  require(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0),
          "cross_entropy: expected logits (N, V) and target (N)");
  require(target.scalar_type() == ScalarType::Long, "cross_entropy: expected an int64 target");
  if (weight) {
    require_contiguous(*weight, "weight");
    require(weight->numel() == logits.size(1) && weight->scalar_type() == logits.scalar_type(),
            "cross_entropy: expected weight (V) of the logits' dtype");
  }
  return {logits.size(0), logits.size(1),  dtype_of(logits), weight ? weight->const_data_ptr() : nullptr,
          ignore_index,   label_smoothing, z_loss,           softcap,
          logit_scale};
}

void require_rows(const Tensor& t, const Tensor& logits, int64_t width, const char* name) {
  require_contiguous(t, name);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  require(t.numel() == width * logits.size(0) && t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
          std::string(name) + ": expected (N) or (N, 2), float32 (float64 for float64 logits)");
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         std::optional<Tensor> weight, std::optional<Tensor> scale,
                                                         int64_t ignore_index, double label_smoothing, double z_loss,
                                                         double softcap, double logit_scale) {
  const auto op = describe(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  if (scale) require_rows(*scale, logits, 1, "scale");
  const ScalarType accum = op.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = empty(logits, {op.N}, accum), stats = empty(logits, {op.N, 2}, accum);
  Tensor dlogits = empty(logits, scale ? std::vector<int64_t>{op.N, op.V} : std::vector<int64_t>{0});
  cpu::cross_entropy_forward(op, logits.const_data_ptr(), static_cast<const int64_t*>(target.const_data_ptr()),
                             scale ? scale->const_data_ptr() : nullptr, loss.mutable_data_ptr(),
                             stats.mutable_data_ptr(), dlogits.mutable_data_ptr());
  return {loss, stats, dlogits};
}

Tensor cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                              std::optional<Tensor> weight, const Tensor& stats, int64_t ignore_index,
                              double label_smoothing, double z_loss, double softcap, double logit_scale) {
  const auto op = describe(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  require_rows(dloss, logits, 1, "dloss"), require_rows(stats, logits, 2, "stats");
  Tensor dlogits = empty(logits, {op.N, op.V});
  cpu::cross_entropy_backward(op, dloss.const_data_ptr(), logits.const_data_ptr(),
                              static_cast<const int64_t*>(target.const_data_ptr()), stats.const_data_ptr(),
                              dlogits.mutable_data_ptr());
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? scale, int ignore_index,"
      " float label_smoothing, float z_loss, float softcap, float logit_scale)"
      " -> (Tensor loss, Tensor stats, Tensor dlogits)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor stats,"
      " int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace llmkern
