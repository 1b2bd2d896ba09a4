#include "core/rnn.h"

#include <tuple>

#include "torch/tensor.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

const void* data(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

void require_shape(const Tensor& t, const std::vector<int64_t>& sizes, const Tensor& like, const char* name) {
  require_contiguous(t, name);
  bool same = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == like.scalar_type();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  std::string expected;
  for (int64_t n : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
  require(same, std::string(name) + ": expected shape (" + expected + ") and the dtype of x");
}

// The problem, with every shape checked that memory safety depends on.
cpu::Lstm describe(const Tensor& x, const Tensor& hx, const Optional& cx, const Tensor& weight_ih,
                   const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh, const Optional& weight_hr,
                   const Optional& batch_sizes, const std::string& mode, bool reverse) {
  require(mode == "lstm", "rnn: the native backend serves mode lstm, got " + mode);
  require(!weight_hr, "rnn: the native backend does not serve projections (weight_hr)");
  require(!batch_sizes, "rnn: the native backend does not serve packed sequences (batch_sizes)");
  require(x.dim() == 3 && hx.dim() == 2 && cx, "rnn: expected x (T, B, I), hx (B, H) and cx (B, H)");
  const int64_t T = x.size(0), B = x.size(1), I = x.size(2), H = hx.size(1);
  require(T > 0 && B > 0 && H > 0, "rnn: expected at least one step, one sequence and one unit");
  require_contiguous(x, "x");
  require_shape(hx, {B, H}, x, "hx"), require_shape(*cx, {B, H}, x, "cx");
  require_shape(weight_ih, {4 * H, I}, x, "weight_ih"), require_shape(weight_hh, {4 * H, H}, x, "weight_hh");
  if (bias_ih) require_shape(*bias_ih, {4 * H}, x, "bias_ih");
  if (bias_hh) require_shape(*bias_hh, {4 * H}, x, "bias_hh");
  return {T,
          B,
          I,
          H,
          dtype_of(x),
          reverse,
          x.const_data_ptr(),
          hx.const_data_ptr(),
          cx->const_data_ptr(),
          weight_ih.const_data_ptr(),
          weight_hh.const_data_ptr(),
          data(bias_ih),
          data(bias_hh)};
}

ScalarType accumulator(const cpu::Lstm& op) { return op.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_forward(const Tensor& x, const Tensor& hx, Optional cx,
                                                               const Tensor& weight_ih, const Tensor& weight_hh,
                                                               Optional bias_ih, Optional bias_hh, Optional weight_hr,
                                                               Optional batch_sizes, std::string mode, bool reverse,
                                                               bool save) {
  const auto op = describe(x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, mode, reverse);
  Tensor y = empty(x, {op.T, op.B, op.H}), hy = empty(x, {op.B, op.H}), cy = empty(x, {op.B, op.H});
  using Sizes = std::vector<int64_t>;
  Tensor gates = empty(x, save ? Sizes{op.T, op.B, 4 * op.H} : Sizes{0});
  Tensor cells = empty(x, save ? Sizes{op.T, op.B, op.H} : Sizes{0}, accumulator(op));
  cpu::lstm_forward(op, y.mutable_data_ptr(), hy.mutable_data_ptr(), cy.mutable_data_ptr(),
                    save ? gates.mutable_data_ptr() : nullptr, save ? cells.mutable_data_ptr() : nullptr);
  return {y, hy, cy, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const Tensor& dy, const Tensor& dhy, Optional dcy, const Tensor& x, const Tensor& hx, Optional cx,
    const Tensor& weight_ih, const Tensor& weight_hh, Optional bias_ih, Optional bias_hh, Optional weight_hr,
    Optional batch_sizes, const Tensor& y, const Tensor& gates, const Tensor& cells, std::string mode, bool reverse,
    bool needs_dx, bool needs_dweights) {
  const auto op = describe(x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, mode, reverse);
  const int64_t T = op.T, B = op.B, I = op.I, H = op.H;
  require(dcy.has_value(), "rnn_backward: expected dcy (B, H)");
  require_shape(dy, {T, B, H}, x, "dy"), require_shape(y, {T, B, H}, x, "y");
  require_shape(dhy, {B, H}, x, "dhy"), require_shape(*dcy, {B, H}, x, "dcy");
  require_shape(gates, {T, B, 4 * H}, x, "gates");
  require_contiguous(cells, "cells");
  require(cells.numel() == T * B * H && cells.scalar_type() == accumulator(op),
          "cells: expected what the forward saved");
  const auto make = [&](bool wanted, const std::vector<int64_t>& sizes) {
    return empty(x, wanted ? sizes : std::vector<int64_t>{0});
  };
  const auto pointer = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  const bool biased = needs_dweights && (bias_ih || bias_hh);
  Tensor dx = make(needs_dx, {T, B, I}), dhx = empty(x, {B, H}), dcx = empty(x, {B, H});
  Tensor dweight_ih = make(needs_dweights, {4 * H, I}), dweight_hh = make(needs_dweights, {4 * H, H});
  Tensor dbias = make(biased, {4 * H});
  cpu::lstm_backward(op, dy.const_data_ptr(), dhy.const_data_ptr(), dcy->const_data_ptr(), y.const_data_ptr(),
                     gates.const_data_ptr(), cells.const_data_ptr(),
                     {pointer(dx), dhx.mutable_data_ptr(), dcx.mutable_data_ptr(), pointer(dweight_ih),
                      pointer(dweight_hh), pointer(dbias)});
  // Two outputs may not share memory.
  Tensor dbias_hh = make(biased && bias_hh, {4 * H});
  if (dbias_hh.numel()) torch::stable::copy_(dbias_hh, dbias);
  return {dx, dhx, dcx, dweight_ih, dweight_hh, dbias, dbias_hh, make(false, {})};
}

}  // namespace

#define LLMKERN_RNN_INPUTS                                                                \
  "Tensor x, Tensor hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih," \
  " Tensor? bias_hh, Tensor? weight_hr, Tensor? batch_sizes"

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def("rnn_forward(" LLMKERN_RNN_INPUTS
        ", str mode, bool reverse, bool save) -> (Tensor y, Tensor hy, Tensor cy, Tensor gates, Tensor cells)");
  m.def("rnn_backward(Tensor dy, Tensor dhy, Tensor? dcy, " LLMKERN_RNN_INPUTS
        ", Tensor y, Tensor gates, Tensor cells, str mode, bool reverse, bool needs_dx, bool needs_dweights)"
        " -> (Tensor dx, Tensor dhx, Tensor dcx, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih,"
        " Tensor dbias_hh, Tensor dweight_hr)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace llmkern
