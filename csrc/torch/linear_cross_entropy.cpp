#include "core/linear_cross_entropy.h"

#include <tuple>

#include "torch/cross_entropy.h"

namespace llmkern {
namespace {

cpu::LinearCrossEntropy describe(const Tensor& x, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
                                 const Tensor& target, const std::optional<Tensor>& weight,
                                 const CrossEntropyOptions& options, int64_t workspace) {
  require_contiguous(x, "x");
  require_contiguous(linear_weight, "linear_weight");
  require(x.dim() == 2 && linear_weight.dim() == 2 && x.size(1) == linear_weight.size(1),
          "linear_cross_entropy: expected x (N, H) and linear_weight (V, H)");
  require(linear_weight.scalar_type() == x.scalar_type(), "linear_cross_entropy: expected linear_weight of x's dtype");
  const DType dtype = dtype_of(x);
  cpu::LinearCrossEntropy op{};
  op.loss = describe(accum_of(dtype), x.size(0), linear_weight.size(0), 1, target, weight, options);
  op.H = x.size(1);
  op.dtype = dtype;
  op.workspace = workspace;
  op.x = x.const_data_ptr();
  op.linear_weight = linear_weight.const_data_ptr();
  if (linear_bias) {
    require_contiguous(*linear_bias, "linear_bias");
    require(linear_bias->numel() == op.loss.V && linear_bias->scalar_type() == x.scalar_type(),
            "linear_cross_entropy: expected linear_bias (V) of x's dtype");
    op.linear_bias = linear_bias->const_data_ptr();
  }
  return op;
}

// GradientTensors that are not wanted are empty.
struct GradientTensors {
  Tensor dx, dlinear_weight, dlinear_bias, dtarget;
  cpu::LinearCrossEntropyGradients pointers;

  GradientTensors(const Tensor& x, const Tensor& linear_weight, const Tensor& target, const std::vector<bool>& need)
      : dx(like(x, need[0])),
        dlinear_weight(like(linear_weight, need[1])),
        dlinear_bias(empty(x, {need[2] ? linear_weight.size(0) : 0})),
        dtarget(like(target, need[3])) {
    pointers = {.dx = data_if(need[0], dx),
                .dlinear_weight = data_if(need[1], dlinear_weight),
                .dlinear_bias = data_if(need[2], dlinear_bias),
                .dtarget = data_if(need[3], dtarget)};
  }
  static Tensor like(const Tensor& t, bool wanted) { return empty_if(wanted, t, sizes_of(t)); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& x, const Tensor& linear_weight, std::optional<Tensor> linear_bias, const Tensor& target,
    std::optional<Tensor> weight, std::optional<Tensor> dloss, int64_t ignore_index, double label_smoothing,
    double z_loss, double softcap, double logit_scale, int64_t workspace, bool entropy, bool argmax, bool need_x,
    bool need_weight, bool need_bias, bool need_target) {
  const auto op = describe(x, linear_weight, linear_bias, target, weight,
                           {ignore_index, label_smoothing, z_loss, softcap, logit_scale}, workspace);
  CrossEntropyResults results(x, {op.loss.N}, op.loss.dtype, entropy, argmax);
  GradientTensors gradients(x, linear_weight, target, {need_x, need_weight, need_bias, need_target});
  cpu::linear_cross_entropy(op, results.outputs, {.loss = rows_of(dloss, op.loss, "dloss")}, gradients.pointers);
  return {results.loss,           results.lse,      results.entropy,
          results.argmax,         gradients.dx,     gradients.dlinear_weight,
          gradients.dlinear_bias, gradients.dtarget};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    std::optional<Tensor> dloss, std::optional<Tensor> dlse, std::optional<Tensor> dentropy, const Tensor& x,
    const Tensor& linear_weight, std::optional<Tensor> linear_bias, const Tensor& target, std::optional<Tensor> weight,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double logit_scale, int64_t workspace,
    bool need_x, bool need_weight, bool need_bias, bool need_target) {
  const auto op = describe(x, linear_weight, linear_bias, target, weight,
                           {ignore_index, label_smoothing, z_loss, softcap, logit_scale}, workspace);
  GradientTensors gradients(x, linear_weight, target, {need_x, need_weight, need_bias, need_target});
  cpu::linear_cross_entropy(op, {},
                            {.loss = rows_of(dloss, op.loss, "dloss"),
                             .lse = rows_of(dlse, op.loss, "dlse"),
                             .entropy = rows_of(dentropy, op.loss, "dentropy")},
                            gradients.pointers);
  return {gradients.dx, gradients.dlinear_weight, gradients.dlinear_bias, gradients.dtarget};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace llmkern
