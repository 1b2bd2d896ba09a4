#include "core/row_optim.h"

#include "torch/indices.h"

namespace llmkern {
namespace {

using Tensors = std::vector<Tensor>;

cpu::RowOptim optimizer_named(const std::string& kind) {
  if (kind == "adam") return cpu::RowOptim::adam;
  if (kind == "sgd") return cpu::RowOptim::sgd;
  require(kind == "adagrad", "row_optim: expected adam, sgd or adagrad, got " + kind);
  return cpu::RowOptim::adagrad;
}

// A table, its states and its step log, in the order of the schema: with every shape checked that memory safety depends
// on.
cpu::RowTable table_of(const Tensor& param, const Tensors& states, const Tensor& applied, const Tensor& history,
                       int64_t count, const std::string& kind, bool decoupled, bool maximize, bool nesterov,
                       bool closed) {
  require_contiguous(param, "param");
  require_contiguous(applied, "applied");
  require_contiguous(history, "history");
  require(param.dim() == 2, "param: expected a table (V, D)");
  require(applied.scalar_type() == ScalarType::Int && applied.numel() == param.size(0), "applied: expected int32 (V)");
  require(history.scalar_type() == ScalarType::Double && history.dim() == 2 && history.size(1) == cpu::kRowRecordSize &&
              count >= 0 && count < history.size(0),
          "history: expected float64 (more than count, " + std::to_string(cpu::kRowRecordSize) + ")");
  cpu::RowTable table{};
  table.rule = {.kind = optimizer_named(kind),
                .decoupled = decoupled,
                .maximize = maximize,
                .nesterov = nesterov,
                .closed = closed};
  static constexpr size_t kLeast[] = {2, 0, 1}, kMost[] = {3, 1, 1};  // of adam, sgd and adagrad
  const int number = static_cast<int>(table.rule.kind);
  require(states.size() >= kLeast[number] && states.size() <= kMost[number],
          "states: expected two or three of adam, none or one of sgd, one of adagrad");
  table.param = param.mutable_data_ptr();
  table.dtype = table.state_dtype = dtype_of(param);
  table.V = param.size(0);
  table.D = param.size(1);
  for (size_t i = 0; i < states.size(); ++i) {
    require_contiguous(states[i], "state");
    table.state_dtype = dtype_of(states[0]);
    require(states[i].numel() == param.numel() && dtype_of(states[i]) == table.state_dtype,
            "state: expected the parameter's shape, and one dtype");
    table.states[i] = states[i].mutable_data_ptr();
  }
  require(table.state_dtype == table.dtype || (table.state_dtype == DType::f32 && table.dtype != DType::f64),
          "state: expected the parameter's dtype, or float32 beside a narrower one");
  const bool fp32 = table.dtype == DType::f32 && table.state_dtype == DType::f32;
  require(!closed || (fp32 && table.rule.kind != cpu::RowOptim::adagrad), "closed: expected float32 and no adagrad");
  table.applied = static_cast<int32_t*>(applied.mutable_data_ptr());
  table.history = static_cast<cpu::RowRecord*>(history.mutable_data_ptr());
  table.count = count;
  return table;
}

cpu::Indices rows_of(const Tensor& indices) {
  require(indices.dim() == 1, "indices: expected (N)");
  return indices_of(indices, "indices");
}

Tensor row_lookup(const Tensor& param, Tensors states, const Tensor& applied, const Tensor& history, int64_t count,
                  std::string kind, bool decoupled, bool maximize, bool nesterov, bool closed, const Tensor& indices) {
  const cpu::RowTable table =
      table_of(param, states, applied, history, count, kind, decoupled, maximize, nesterov, closed);
  require(closed, "row_lookup: expected a closed rule");
  const int64_t N = indices.numel();
  Tensor out = empty(param, {N, table.D});
  cpu::row_lookup(table, rows_of(indices), N, out.mutable_data_ptr());
  return out;
}

void row_catch_up(const Tensor& param, Tensors states, const Tensor& applied, const Tensor& history, int64_t count,
                  std::string kind, bool decoupled, bool maximize, bool nesterov, bool closed,
                  std::optional<Tensor> indices) {
  const cpu::RowTable table =
      table_of(param, states, applied, history, count, kind, decoupled, maximize, nesterov, closed);
  if (indices)
    cpu::row_catch_up(table, cpu::RowOrder(rows_of(*indices), indices->numel(), table.V));
  else
    cpu::row_catch_up(table);
}

bool row_step(const Tensor& param, Tensors states, const Tensor& applied, const Tensor& history, int64_t count,
              std::string kind, bool decoupled, bool maximize, bool nesterov, bool closed, const Tensor& indices,
              const Tensor& values, std::vector<double> step, double grad_scale) {
  const cpu::RowTable table =
      table_of(param, states, applied, history, count, kind, decoupled, maximize, nesterov, closed);
  require_contiguous(values, "values");
  require(values.dim() == 2 && values.size(0) == indices.numel() && values.size(1) == table.D &&
              dtype_of(values) == table.dtype,
          "values: expected (N, D) of the parameter's dtype");
  require(step.size() == 6, "step: expected step, lr, two numbers of the rule, eps and weight_decay");
  return cpu::row_step(
      table,
      {.step = step[0], .lr = step[1], .first = step[2], .second = step[3], .eps = step[4], .weight_decay = step[5]},
      grad_scale, cpu::RowOrder(rows_of(indices), indices.numel(), table.V), values.const_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("row_lookup", TORCH_BOX(&row_lookup));
  m.impl("row_catch_up", TORCH_BOX(&row_catch_up));
  m.impl("row_step", TORCH_BOX(&row_step));
}

}  // namespace llmkern
