#include "core/cross_entropy.h"

#include <tuple>

#include "torch/cross_entropy.h"
#include "torch/tensor.h"

namespace llmkern {

cpu::CrossEntropy describe(DType dtype, int64_t N, int64_t V, int64_t D, const Tensor& target,
                           const std::optional<Tensor>& weight, const CrossEntropyOptions& options) {
  require_contiguous(target, "target");
  cpu::CrossEntropy op{};
  op.N = N;
  op.V = V;
  op.D = D;
  op.dtype = dtype;
  if (target.scalar_type() == ScalarType::Long) {
    require(target.numel() == N * D, "cross_entropy: expected a target for every row");
    op.target = static_cast<const int64_t*>(target.const_data_ptr());
  } else {
    require(target.numel() == N * V * D, "cross_entropy: expected probabilities of the logits' shape");
    op.probabilities = target.const_data_ptr();
    op.target_dtype = dtype_of(target);
    require((op.target_dtype == DType::f64) == (dtype == DType::f64), "cross_entropy: float64 cannot be mixed");
  }
  if (weight) {
    require_contiguous(*weight, "weight");
    op.weight = weight->const_data_ptr();
    op.weight_dtype = dtype_of(*weight);
    require(weight->numel() == V && (op.weight_dtype == DType::f64) == (dtype == DType::f64),
            "cross_entropy: expected weight (V), in float64 if the logits are");
  }
  op.ignore_index = options.ignore_index;
  op.label_smoothing = options.label_smoothing;
  op.z_loss = options.z_loss;
  op.softcap = options.softcap;
  op.logit_scale = options.logit_scale;
  return op;
}

const void* rows_of(const std::optional<Tensor>& t, const cpu::CrossEntropy& op, const char* name) {
  if (!t) return nullptr;
  require_contiguous(*t, name);
  require(t->numel() == op.N * op.D && dtype_of(*t) == accum_of(op.dtype),
          std::string(name) + ": expected one for every row, float32 (float64 for float64)");
  return t->const_data_ptr();
}

CrossEntropyResults::CrossEntropyResults(const Tensor& like, const std::vector<int64_t>& sizes, DType dtype,
                                         bool entropy, bool argmax) {
  const ScalarType accum = accum_type(dtype);
  loss = empty(like, sizes, accum);
  lse = empty(like, sizes, accum);
  this->entropy = empty_if(entropy, like, sizes, accum);
  this->argmax = empty_if(argmax, like, sizes, ScalarType::Long);
  outputs = {.loss = loss.mutable_data_ptr(),
             .lse = lse.mutable_data_ptr(),
             .entropy = data_if(entropy, this->entropy),
             .argmax = static_cast<int64_t*>(data_if(argmax, this->argmax))};
}

namespace {

// Logits (N, V) or (N, V, D).
cpu::CrossEntropy describe(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                           const CrossEntropyOptions& options) {
  require_contiguous(logits, "logits");
  require(logits.dim() == 2 || logits.dim() == 3, "cross_entropy: expected logits (N, V) or (N, V, D)");
  return describe(dtype_of(logits), logits.size(0), logits.size(1), logits.dim() == 3 ? logits.size(2) : 1, target,
                  weight, options);
}

std::vector<int64_t> row_sizes(const Tensor& logits) {
  return logits.dim() == 3 ? std::vector<int64_t>{logits.size(0), logits.size(2)}
                           : std::vector<int64_t>{logits.size(0)};
}

Tensor like(const Tensor& t, bool wanted) { return empty_if(wanted, t, sizes_of(t)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> dloss,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double logit_scale, bool entropy,
    bool argmax, bool need_logits, bool need_target) {
  const auto op = describe(logits, target, weight, {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  CrossEntropyResults results(logits, row_sizes(logits), op.dtype, entropy, argmax);
  Tensor dlogits = like(logits, need_logits), dtarget = like(target, need_target);
  cpu::cross_entropy(
      op, logits.const_data_ptr(), results.outputs, {.loss = rows_of(dloss, op, "dloss")},
      {.dlogits = data_if(need_logits, dlogits), .dtype = op.dtype, .dtarget = data_if(need_target, dtarget)});
  return {results.loss, results.lse, results.entropy, results.argmax, dlogits, dtarget};
}

// The gradient replaces the logits.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_(Tensor logits, const Tensor& target,
                                                                          std::optional<Tensor> weight,
                                                                          const Tensor& dloss, int64_t ignore_index,
                                                                          double label_smoothing, double z_loss,
                                                                          double softcap, double logit_scale,
                                                                          bool entropy, bool argmax, bool need_target) {
  const auto op = describe(logits, target, weight, {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  CrossEntropyResults results(logits, row_sizes(logits), op.dtype, entropy, argmax);
  Tensor dtarget = like(target, need_target);
  cpu::cross_entropy(
      op, logits.const_data_ptr(), results.outputs, {.loss = rows_of(dloss, op, "dloss")},
      {.dlogits = logits.mutable_data_ptr(), .dtype = op.dtype, .dtarget = data_if(need_target, dtarget)});
  return {results.loss, results.lse, results.entropy, results.argmax, dtarget};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(std::optional<Tensor> dloss, std::optional<Tensor> dlse,
                                                  std::optional<Tensor> dentropy, const Tensor& logits,
                                                  const Tensor& target, std::optional<Tensor> weight,
                                                  int64_t ignore_index, double label_smoothing, double z_loss,
                                                  double softcap, double logit_scale, bool need_logits,
                                                  bool need_target) {
  const auto op = describe(logits, target, weight, {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  Tensor dlogits = like(logits, need_logits), dtarget = like(target, need_target);
  cpu::cross_entropy(
      op, logits.const_data_ptr(), {},
      {.loss = rows_of(dloss, op, "dloss"),
       .lse = rows_of(dlse, op, "dlse"),
       .entropy = rows_of(dentropy, op, "dentropy")},
      {.dlogits = data_if(need_logits, dlogits), .dtype = op.dtype, .dtarget = data_if(need_target, dtarget)});
  return {dlogits, dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_forward_", TORCH_BOX(&cross_entropy_forward_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace llmkern
