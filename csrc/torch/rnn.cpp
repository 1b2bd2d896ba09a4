#include <tuple>

#include "core/rnn_norm.h"
#include "torch/tensor.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

void require_shape(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, const char* name) {
  require_contiguous(t, name);
  bool same = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == dtype;
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  std::string expected;
  for (int64_t n : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
  require(same, std::string(name) + ": expected shape (" + expected + ") and the dtype of x (states: of hx)");
}

cpu::RnnMode mode_of(const std::string& mode) {
  if (mode == "lstm") return cpu::RnnMode::lstm;
  if (mode == "gru") return cpu::RnnMode::gru;
  if (mode == "rnn_tanh") return cpu::RnnMode::rnn_tanh;
  if (mode == "rnn_relu") return cpu::RnnMode::rnn_relu;
  require(mode == "slstm", "rnn: expected mode lstm, gru, rnn_tanh, rnn_relu or slstm, got " + mode);
  return cpu::RnnMode::slstm;
}

// The steps' numbers of rows are trusted with memory, so they are looked at.
void check_packed(const Tensor& batch_sizes, int64_t total, int64_t B) {
  require_contiguous(batch_sizes, "batch_sizes");
  require(batch_sizes.scalar_type() == ScalarType::Long, "batch_sizes: expected int64");
  const int64_t* const rows = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
  int64_t sum = 0;
  for (int64_t t = 0; t < batch_sizes.numel(); ++t) {
    require(rows[t] > 0 && rows[t] <= (t ? rows[t - 1] : B),
            "batch_sizes: expected at most B, then no more than the one before");
    sum += rows[t];
  }
  require(batch_sizes.numel() > 0 && sum == total, "batch_sizes: expected their sum rows of x");
}

// The sizes of x, but for its last.
std::vector<int64_t> token_sizes(const Tensor& x, int64_t width) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = width;
  return sizes;
}

// The layer that the arguments describe, in the order of the schema: with every shape checked that memory safety
// depends on.
cpu::Rnn layer_of(const Tensor& x, const Tensor& hx, const Optional& cx, const Tensor& weight_ih,
                  const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh, const Optional& weight_hr,
                  const Optional& peephole, const Optional& norms, const Optional& batch_sizes, const Optional& seed,
                  const std::string& mode, bool reverse, bool batch_first, double clip, double zoneout,
                  double zoneout_cell) {
  cpu::Rnn op{};
  op.mode = mode_of(mode);
  const bool lstm = op.mode == cpu::RnnMode::lstm;
  require(x.dim() == (batch_sizes ? 2 : 3) && hx.dim() == 2 && weight_hh.dim() == 2 &&
              (lstm || op.mode == cpu::RnnMode::slstm) == cx.has_value(),
          "rnn: expected x (T, B, I), or (tokens, I) with batch_sizes, hx (B, P), and cx for lstm and slstm alone");
  require(!batch_sizes || !batch_first, "rnn: a packed sequence has no batch_first");
  op.B = hx.size(0);
  op.P = hx.size(1);
  op.H = weight_hr ? weight_hr->size(1) : op.P;
  op.I = x.size(x.dim() - 1);
  op.T = batch_sizes ? batch_sizes->numel() : x.size(batch_first ? 1 : 0);
  require(op.T > 0 && op.B > 0 && op.H > 0 && op.P > 0, "rnn: expected at least one step, sequence and unit");
  const int64_t G = cpu::gates_of(op.mode), H = op.H, P = op.P, columns = weight_hh.size(1);
  require(columns > 0 && P % columns == 0 && (columns == P || (P == H && H % (P / columns) == 0)),
          "weight_hh: expected H columns, or H divided by the number of heads");
  op.heads = P / columns;
  const ScalarType dtype = x.scalar_type(), states = hx.scalar_type();
  op.dtype = dtype_of(x);
  op.state_dtype = dtype_of(hx);
  require(states == dtype || (states == ScalarType::Float && op.dtype != DType::f64),
          "hx: expected the dtype of x, or float32 beside bfloat16 and float16");
  require_contiguous(x, "x");
  if (batch_sizes)
    check_packed(*batch_sizes, x.size(0), op.B);
  else
    require(x.size(batch_first ? 0 : 1) == op.B, "hx: expected as many sequences as x");
  require_shape(hx, {op.B, P}, states, "hx");
  if (cx) require_shape(*cx, {op.B, cpu::cells_of(op)}, states, "cx");
  require_shape(weight_ih, {G * H, op.I}, dtype, "weight_ih");
  require_shape(weight_hh, {G * H, columns}, dtype, "weight_hh");
  if (bias_ih) require_shape(*bias_ih, {G * H}, dtype, "bias_ih");
  if (bias_hh) require_shape(*bias_hh, {G * H}, dtype, "bias_hh");
  if (weight_hr) require_shape(*weight_hr, {P, H}, dtype, "weight_hr");
  if (peephole) require_shape(*peephole, {3, H}, dtype, "peephole");
  if (norms) require_shape(*norms, {cpu::norms_of(op)}, dtype, "norms");
  require(lstm || (!weight_hr && !peephole && zoneout_cell == 0), "rnn: an option of lstm alone");
  require(!weight_hr || (clip == 0 && zoneout == 0 && zoneout_cell == 0),
          "rnn: a projection excludes clip and zoneout");
  op.reverse = reverse;
  op.batch_first = batch_first;
  op.batch_sizes = static_cast<const int64_t*>(data_of(batch_sizes));
  op.x = x.const_data_ptr();
  op.hx = hx.const_data_ptr();
  op.cx = data_of(cx);
  op.weight_ih = weight_ih.const_data_ptr();
  op.weight_hh = weight_hh.const_data_ptr();
  op.bias_ih = data_of(bias_ih);
  op.bias_hh = data_of(bias_hh);
  op.weight_hr = data_of(weight_hr);
  op.peephole = data_of(peephole);
  op.norms = data_of(norms);
  op.clip = clip;
  op.zoneout_h = zoneout;
  op.zoneout_c = zoneout_cell;
  op.draws = seed.has_value();
  if (seed) {
    require_shape(*seed, {}, ScalarType::Long, "seed");
    op.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
  }
  return op;
}

void* pointer(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_forward(
    const Tensor& x, const Tensor& hx, Optional cx, const Tensor& weight_ih, const Tensor& weight_hh, Optional bias_ih,
    Optional bias_hh, Optional weight_hr, Optional peephole, Optional norms, Optional batch_sizes, Optional seed,
    std::string mode, bool reverse, bool batch_first, double clip, double zoneout, double zoneout_cell, bool save) {
  const cpu::Rnn op = layer_of(x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms,
                               batch_sizes, seed, mode, reverse, batch_first, clip, zoneout, zoneout_cell);
  const int64_t C = cpu::cells_of(op);
  const int64_t saved = save ? cpu::saved_of(op) * op.H : 0;
  Tensor y = empty(x, token_sizes(x, op.P)), hy = empty(hx, {op.B, op.P}), cy = empty_if(C > 0, hx, {op.B, C});
  Tensor gates = empty_if(saved > 0, x, token_sizes(x, saved));
  Tensor cells = empty_if(save && C > 0, x, token_sizes(x, C), accum_type(op.dtype));
  Tensor normed = empty_if(save && norms, x, token_sizes(x, cpu::normed_of(op)), accum_type(op.dtype));
  cpu::rnn_forward(op, {.y = y.mutable_data_ptr(),
                        .hy = hy.mutable_data_ptr(),
                        .cy = pointer(cy),
                        .gates = pointer(gates),
                        .cells = pointer(cells),
                        .normed = pointer(normed)});
  return {y, hy, cy, gates, cells, normed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const Tensor& dy, const Tensor& dhy, Optional dcy, Optional dcells, const Tensor& x, const Tensor& hx, Optional cx,
    const Tensor& weight_ih, const Tensor& weight_hh, Optional bias_ih, Optional bias_hh, Optional weight_hr,
    Optional peephole, Optional norms, Optional batch_sizes, Optional seed, const Tensor& y, const Tensor& gates,
    const Tensor& cells, const Tensor& normed, std::string mode, bool reverse, bool batch_first, double clip,
    double zoneout, double zoneout_cell, bool needs_dx, bool needs_dstates, bool needs_dweights) {
  const cpu::Rnn op = layer_of(x, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms,
                               batch_sizes, seed, mode, reverse, batch_first, clip, zoneout, zoneout_cell);
  const int64_t C = cpu::cells_of(op), saved = cpu::saved_of(op) * op.H;
  const ScalarType dtype = x.scalar_type(), states = hx.scalar_type();
  require(dcy.has_value() == (C > 0), "rnn_backward: expected dcy where there is a cx");
  require_shape(dy, token_sizes(x, op.P), dtype, "dy");
  require_shape(y, token_sizes(x, op.P), dtype, "y");
  require_shape(dhy, {op.B, op.P}, states, "dhy");
  if (dcy) require_shape(*dcy, {op.B, C}, states, "dcy");
  if (saved > 0) require_shape(gates, token_sizes(x, saved), dtype, "gates");
  if (C > 0) require_shape(cells, token_sizes(x, C), accum_type(op.dtype), "cells");
  if (dcells) require_shape(*dcells, token_sizes(x, C), accum_type(op.dtype), "dcells");
  if (norms) require_shape(normed, token_sizes(x, cpu::normed_of(op)), accum_type(op.dtype), "normed");
  const auto like = [&](bool wanted, const Optional& t) {
    return empty_if(wanted && t, t ? *t : x, t ? sizes_of(*t) : std::vector<int64_t>{});
  };
  const bool weights = needs_dweights;
  Tensor dx = like(needs_dx, x), dhx = like(needs_dstates, hx), dcx = like(needs_dstates, cx);
  Tensor dweight_ih = like(weights, weight_ih), dweight_hh = like(weights, weight_hh);
  Tensor dbias_ih = like(weights, bias_ih), dbias_hh = like(weights, bias_hh);
  Tensor dweight_hr = like(weights, weight_hr), dpeephole = like(weights, peephole);
  Tensor dnorms = like(weights, norms);
  cpu::rnn_backward(op,
                    {.dy = dy.const_data_ptr(),
                     .dcells = data_of(dcells),
                     .dhy = dhy.const_data_ptr(),
                     .dcy = data_of(dcy),
                     .y = y.const_data_ptr(),
                     .gates = saved > 0 ? gates.const_data_ptr() : nullptr,
                     .cells = C > 0 ? cells.const_data_ptr() : nullptr,
                     .normed = norms ? normed.const_data_ptr() : nullptr},
                    {.dx = pointer(dx),
                     .dhx = pointer(dhx),
                     .dcx = pointer(dcx),
                     .dweight_ih = pointer(dweight_ih),
                     .dweight_hh = pointer(dweight_hh),
                     .dbias_ih = pointer(dbias_ih),
                     .dbias_hh = pointer(dbias_hh),
                     .dweight_hr = pointer(dweight_hr),
                     .dpeephole = pointer(dpeephole),
                     .dnorms = pointer(dnorms)});
  return {dx, dhx, dcx, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorms};
}

// One step of a plain layer or cell that nothing will differentiate: few arguments and results, because decoding calls
// it for every token. x (..., I), hx and cx (..., H), of any leading sizes that agree in number.
cpu::Rnn describe_step(cpu::RnnMode mode, const Tensor& x, const Tensor& hx, const Tensor& weight_ih,
                       const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh) {
  cpu::Rnn op{};
  require(x.dim() > 0 && x.dim() == hx.dim(), "rnn_step: expected as many dimensions of x as of hx");
  op.mode = mode;
  op.T = 1;
  op.heads = 1;
  op.I = x.size(x.dim() - 1);
  op.H = op.P = hx.size(hx.dim() - 1);
  require(op.I > 0 && op.H > 0 && hx.numel() > 0, "rnn_step: expected at least one sequence and one unit");
  op.B = hx.numel() / op.H;
  const ScalarType dtype = x.scalar_type();
  const int64_t rows = cpu::gates_of(mode) * op.H;
  require(x.numel() == op.B * op.I && hx.scalar_type() == dtype, "rnn_step: expected hx like x");
  require_contiguous(x, "x");
  require_contiguous(hx, "hx");
  require_shape(weight_ih, {rows, op.I}, dtype, "weight_ih");
  require_shape(weight_hh, {rows, op.H}, dtype, "weight_hh");
  if (bias_ih) require_shape(*bias_ih, {rows}, dtype, "bias_ih");
  if (bias_hh) require_shape(*bias_hh, {rows}, dtype, "bias_hh");
  op.dtype = op.state_dtype = dtype_of(x);
  op.x = x.const_data_ptr();
  op.hx = hx.const_data_ptr();
  op.weight_ih = weight_ih.const_data_ptr();
  op.weight_hh = weight_hh.const_data_ptr();
  op.bias_ih = data_of(bias_ih);
  op.bias_hh = data_of(bias_hh);
  return op;
}

std::tuple<Tensor, Tensor> lstm_step(const Tensor& x, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                                     const Tensor& weight_hh, Optional bias_ih, Optional bias_hh) {
  auto op = describe_step(cpu::RnnMode::lstm, x, hx, weight_ih, weight_hh, bias_ih, bias_hh);
  require_contiguous(cx, "cx");
  bool same = cx.dim() == hx.dim() && cx.scalar_type() == hx.scalar_type();
  for (int64_t d = 0; same && d < hx.dim(); ++d) same = cx.size(d) == hx.size(d);
  require(same, "lstm_step: expected cx like hx");
  op.cx = cx.const_data_ptr();
  Tensor hy = torch::stable::empty_like(hx), cy = torch::stable::empty_like(cx);
  cpu::rnn_forward(op, {.y = hy.mutable_data_ptr(), .hy = hy.mutable_data_ptr(), .cy = cy.mutable_data_ptr()});
  return {hy, cy};
}

Tensor rnn_step(const Tensor& x, const Tensor& hx, const Tensor& weight_ih, const Tensor& weight_hh, Optional bias_ih,
                Optional bias_hh, int64_t mode) {
  require(mode > 0 && mode <= static_cast<int64_t>(cpu::RnnMode::rnn_relu), "rnn_step: expected a mode of one state");
  const auto op = describe_step(static_cast<cpu::RnnMode>(mode), x, hx, weight_ih, weight_hh, bias_ih, bias_hh);
  Tensor hy = torch::stable::empty_like(hx);
  cpu::rnn_forward(op, {.y = hy.mutable_data_ptr(), .hy = hy.mutable_data_ptr(), .cy = nullptr});
  return hy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def(
      "lstm_step(Tensor x, Tensor hx, Tensor cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh)"
      " -> (Tensor, Tensor)");
  m.def(
      "rnn_step(Tensor x, Tensor hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, int mode)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
  m.impl("lstm_step", TORCH_BOX(&lstm_step));
  m.impl("rnn_step", TORCH_BOX(&rnn_step));
}

}  // namespace llmkern
