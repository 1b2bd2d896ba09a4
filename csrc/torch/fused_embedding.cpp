#include "core/fused_embedding.h"

#include <tuple>

#include "torch/indices.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

cpu::Norm norm_named(const std::string& name) {
  if (name == "none") return cpu::Norm::none;
  if (name == "layer") return cpu::Norm::layer;
  require(name == "rms", "fused_embedding: expected norm none, layer or rms, got " + name);
  return cpu::Norm::rms;
}

cpu::FusedTable table_of(const Tensor& weight, const Tensor& t, const Tensor& at, const cpu::FusedEmbedding& op,
                         bool reads, const char* name) {
  if (reads) require_contiguous(t, name);
  const cpu::Indices rows = indices_of(at, "indices");
  const int64_t period = at.numel();
  require(t.dim() == 2 && t.size(1) == op.D && t.scalar_type() == weight.scalar_type() &&
              (period == 0 ? op.N == 0 : op.N % period == 0),
          std::string(name) + ": expected (rows, D) of weight's dtype, and indices of which N is a multiple");
  return {.data = reads ? t.const_data_ptr() : nullptr, .rows = t.size(0), .indices = rows, .period = period};
}

const void* row_of(const Tensor& weight, const Optional& t, const char* name) {
  if (!t) return nullptr;
  require_contiguous(*t, name);
  require(t->dim() == 1 && t->size(0) == weight.size(1) && t->scalar_type() == weight.scalar_type(),
          std::string(name) + ": expected (D) of weight's dtype");
  return t->const_data_ptr();
}

// What the arguments that both ops share describe, in the order of the schema. `reads`: whether the tables' values are
// looked at, and not their shapes alone.
cpu::FusedEmbedding problem_of(const Tensor& weight, const Optional& position_weight, const Optional& token_type_weight,
                               const Optional& norm_weight, const Optional& norm_bias, const Tensor& indices,
                               const Optional& positions, const Optional& token_types, double scale,
                               const std::string& norm, double eps, double p, int64_t seed, bool reads) {
  cpu::FusedEmbedding op{};
  require(weight.dim() == 2 && indices.dim() == 1, "fused_embedding: expected weight (V, D) and indices (N)");
  require(p >= 0 && p <= 1, "fused_embedding: expected a probability between 0 and 1, got " + std::to_string(p));
  op.dtype = dtype_of(weight);
  op.N = indices.numel();
  op.D = weight.size(1);
  op.norm = norm_named(norm);
  op.scale = scale;
  op.eps = eps;
  op.p = p;
  op.seed = static_cast<uint64_t>(seed);
  op.tables[0] = table_of(weight, weight, indices, op, reads, "weight");
  require(
      position_weight.has_value() == positions.has_value() && token_type_weight.has_value() == token_types.has_value(),
      "fused_embedding: expected a table and its indices, or neither");
  if (positions) op.tables[1] = table_of(weight, *position_weight, *positions, op, reads, "position_weight");
  if (token_types) op.tables[2] = table_of(weight, *token_type_weight, *token_types, op, reads, "token_type_weight");
  op.norm_weight = row_of(weight, norm_weight, "norm_weight");
  op.norm_bias = row_of(weight, norm_bias, "norm_bias");
  return op;
}

std::tuple<Tensor, Tensor> fused_embedding_forward(const Tensor& weight, Optional position_weight,
                                                   Optional token_type_weight, Optional norm_weight, Optional norm_bias,
                                                   const Tensor& indices, Optional positions, Optional token_types,
                                                   double scale, std::string norm, double eps, double p, int64_t seed,
                                                   int64_t /*padding_idx*/, bool /*scale_grad_by_freq*/) {
  const cpu::FusedEmbedding op = problem_of(weight, position_weight, token_type_weight, norm_weight, norm_bias, indices,
                                            positions, token_types, scale, norm, eps, p, seed, true);
  Tensor out = empty(weight, {op.N, op.D});
  Tensor stats = empty(weight, {op.norm == cpu::Norm::none ? 0 : op.N, 2}, accum_type(op.dtype));
  cpu::fused_embedding_forward(op, out.mutable_data_ptr(), stats.mutable_data_ptr());
  return {out, stats};
}

Gradients fused_embedding_backward(const Tensor& dout, const Tensor& weight, Optional position_weight,
                                   Optional token_type_weight, Optional norm_weight, Optional norm_bias,
                                   const Tensor& indices, Optional positions, Optional token_types, const Tensor& stats,
                                   double scale, std::string norm, double eps, double p, int64_t seed,
                                   int64_t padding_idx, bool scale_grad_by_freq, int64_t wants) {
  const cpu::FusedEmbedding op = problem_of(weight, position_weight, token_type_weight, norm_weight, norm_bias, indices,
                                            positions, token_types, scale, norm, eps, p, seed, norm != "none");
  require_contiguous(dout, "dout");
  require_contiguous(stats, "stats");
  require(dout.dim() == 2 && dout.size(0) == op.N && dout.size(1) == op.D && dtype_of(dout) == op.dtype,
          "dout: expected (N, D) of weight's dtype");
  require(op.norm == cpu::Norm::none || (stats.numel() == 2 * op.N && stats.scalar_type() == accum_type(op.dtype)),
          "stats: expected what the forward gave");
  const Optional operands[] = {weight, position_weight, token_type_weight, norm_weight, norm_bias};
  std::vector<Tensor> grads;
  void* to[5];
  for (int k = 0; k < 5; ++k) {
    const bool wanted = (wants >> k & 1) != 0 && operands[k];
    grads.push_back(empty_if(wanted, dout, wanted ? sizes_of(*operands[k]) : std::vector<int64_t>{}));
    to[k] = data_if(wanted, grads[k]);
  }
  cpu::fused_embedding_backward(op, dout.const_data_ptr(), stats.const_data_ptr(),
                                {.tables = {to[0], to[1], to[2]},
                                 .norm_weight = to[3],
                                 .norm_bias = to[4],
                                 .padding_idx = padding_idx,
                                 .scale_grad_by_freq = scale_grad_by_freq});
  return {grads[0], grads[1], grads[2], grads[3], grads[4]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("fused_embedding_forward", TORCH_BOX(&fused_embedding_forward));
  m.impl("fused_embedding_backward", TORCH_BOX(&fused_embedding_backward));
}

}  // namespace llmkern
