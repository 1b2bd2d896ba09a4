// The gradients that a recurrent layer's backward keeps while it runs, and where they lie. See rnn_backward.cpp.
#pragma once
#include "core/rnn_loop.h"

namespace llmkern::cpu::rnn {

// Columns of dgates that belong to as many rows of the weights: gru keeps its two kinds apart.
struct Columns {
  int64_t row, count, column;
};
inline std::vector<Columns> hidden_columns(const Rnn& op) {
  const int64_t H = op.H;
  if (op.mode == RnnMode::gru)
    return {{.row = 2 * H, .count = H, .column = 0}, {.row = 0, .count = 2 * H, .column = H}};
  return {{.row = 0, .count = gates_of(op.mode) * H, .column = 0}};
}
inline Columns input_columns(const Rnn& op) {
  return {.row = 0, .count = gates_of(op.mode) * op.H, .column = op.mode == RnnMode::gru ? op.H : 0};
}

// Where a head's columns of dhidden meet its rows of W_hh.
template <class S>
std::vector<typename Panels<S>::Chunk> chunks_of(const Rnn& op, int64_t head) {
  std::vector<typename Panels<S>::Chunk> all;
  const int64_t units = op.H / op.heads;
  const std::vector<Columns> normed{{.row = 0, .count = gates_of(op.mode) * op.H, .column = 0}};
  for (const Columns& c : op.norms ? normed : hidden_columns(op)) {
    if (op.heads == 1) all.push_back({.k = c.row, .depth = c.count, .column = c.column});
    for (int64_t g = 0; op.heads > 1 && g < c.count; g += op.H)
      all.push_back({.k = c.row + g + head * units, .depth = units, .column = c.column + g + head * units});
  }
  return all;
}

// The gradients of the states, which the loop takes from step to step, and the states before the first step.
template <class S>
class StateGradients {
 public:
  StateGradients(const RnnProblem<S>& p, const RnnCotangents& given)
      : dh(p.op.B * p.op.P),
        dc(p.op.B * cells_of(p.op)),
        c0(p.op.B * cells_of(p.op)),
        h0(p.op.B * p.op.P * itemsize(p.op.dtype)),
        unprojected_(p.op.weight_hr ? p.op.B * p.op.H : 0),
        p_(p) {
    const Rnn& op = p.op;
    const int64_t states = op.B * op.P, cells = op.B * cells_of(op);
    load(states, given.dhy, dh);
    if (op.cx) load(cells, given.dcy, dc);
    if (op.cx) load(cells, op.cx, c0);
    p.kernels.copy(states, op.hx, op.state_dtype, h0.get(), op.dtype);
  }
  // Of h as the cell makes it: before its projection, if it has one.
  S* of_cell() const { return p_.op.weight_hr ? unprojected_.get() : dh.get(); }

  const Buffer<S> dh, dc, c0;
  const Buffer<char> h0;  // in the dtype of y

 private:
  void load(int64_t n, const void* from, const Buffer<S>& to) const {
    p_.kernels.copy(n, from, p_.op.state_dtype, to.get(), p_.types.wide);
  }
  const Buffer<S> unprojected_;
  const RnnProblem<S>& p_;
};

// What the loop leaves for the products after it, a row for each token.
template <class S>
class TokenGradients {
 public:
  TokenGradients(const RnnProblem<S>& p, const RnnGradients& out)
      : p_(p),
        D_(dgates_of(p.op)),
        dgates_(rows(D_, p.types.operand)),
        dhidden_(rows(p.op.norms ? dhidden_of(p.op) : 0, p.types.operand)),
        dprojected_(rows(p.op.weight_hr ? even(p.op.P) : 0, p.types.operand)),
        unprojected_(rows(p.op.weight_hr && out.dweight_hr ? p.op.H : 0, p.op.dtype)) {
    const Rnn& op = p.op;
    clear(dgates(), dgates_used(op));
    if (op.norms) clear(dhidden(), gates_of(op.mode) * op.H);
    if (op.weight_hr) clear(dprojected(), op.P);
  }
  MutableView dgates() const { return {.data = dgates_.get(), .dtype = p_.types.operand, .ld = D_}; }
  // The gradients of U h: without norms those of the gates.
  MutableView dhidden() const {
    if (!p_.op.norms) return dgates();
    return {.data = dhidden_.get(), .dtype = p_.types.operand, .ld = dhidden_of(p_.op)};
  }
  // Of h after its projection, and h before it.
  MutableView dprojected() const { return {.data = dprojected_.get(), .dtype = p_.types.operand, .ld = even(p_.op.P)}; }
  MutableView unprojected() const { return {.data = unprojected_.get(), .dtype = p_.op.dtype, .ld = p_.op.H}; }

 private:
  int64_t rows(int64_t width, DType dtype) const { return p_.tokens.total() * width * itemsize(dtype); }
  // The columns that make rows of pairs even; they meet zeros, which must not be NaN's.
  void clear(const MutableView& x, int64_t used) const {
    for (int64_t i = 0; used < x.ld && i < p_.tokens.total(); ++i)
      std::fill_n(at(x.data, i * x.ld + used, x.dtype), (x.ld - used) * itemsize(x.dtype), 0);
  }

  const RnnProblem<S>& p_;
  const int64_t D_;
  const Buffer<char> dgates_, dhidden_, dprojected_, unprojected_;
};

// Gradients of parameters that the loop adds up itself, row by row of the batch, and the norms' weights in S.
template <class S>
struct RowGradients {
  RowGradients(const RnnProblem<S>& p, const RnnGradients& out)
      : norms(p.op.norms ? norms_of(p.op) : 0),
        dnorm_c(p.op.norms ? p.op.B * 2 * p.op.H : 0),
        dpeephole(out.dpeephole ? p.op.B * 3 * p.op.H : 0) {
    if (p.op.norms) p.kernels.copy(norms_of(p.op), p.op.norms, p.op.dtype, norms.get(), p.types.wide);
    if (p.op.norms) std::fill_n(dnorm_c.get(), p.op.B * 2 * p.op.H, S{0});
    if (out.dpeephole) std::fill_n(dpeephole.get(), p.op.B * 3 * p.op.H, S{0});
  }
  const Buffer<S> norms, dnorm_c, dpeephole;
};

}  // namespace llmkern::cpu::rnn
