// Recurrent layers, forward: a whole sequence in one parallel region.
//
// FLOPs: 2 tokens G H (I + P). The input projection x W_ih^T is one product over all of time; what remains is the time
// loop, h W_hh^T. W_hh is packed once per call into panels (see rnn_loop.h): the gates of a vector of units are summed
// together in registers, and the cell follows while they are in the first cache. A few steps of few rows go another way
// (rnn_step.cpp): packing costs as much as several of them.
//
// Sequences never meet in the loop, so threads take theirs through all steps and do not wait for each other; with few
// sequences they share the units instead, and meet after each step. Layouts (steps first, batch first, packed) differ
// only in where a step's rows lie. States are carried in fp32 (fp64 for fp64); h is rounded to bf16 where products
// are taken from pairs of it.
//
// Memory: x W_ih^T is written where the gates will be saved, or to y, if its type is theirs; else it is scratch, for at
// most 16 MB of steps at a time.
#include "core/rnn.h"

#include "core/rnn_states.h"

namespace llmkern::cpu {
namespace rnn {
namespace {

constexpr int64_t kNormedRows = 64;  // that share what a panel's load costs, and whose sums lie in L2

// The projection of an lstm's h by W_hr, and where it goes.
template <class S>
class Projection {
 public:
  Projection(const RnnProblem<S>& p, const RnnOutputs& out, const States<S>& states)
      : p_(p), out_(out), states_(states), panels_(p) {
    if (!p.op.weight_hr) return;
    panels_.add({.w = p.op.weight_hr, .ld = p.op.H, .count = p.op.P}, {{.k = 0, .depth = p.op.H, .column = 0}});
    panels_.pack();
  }
  int64_t panels() const { return panels_.count(); }

  // Of sequences [begin, end) of step s, by some of the panels.
  void run(Range panels, int64_t s, int64_t begin, int64_t end, S* sums) const {
    const int64_t first = p_.tokens.first(p_.tokens.time(s));
    for (int64_t i = panels.begin; i < panels.end; ++i)
      panels_.multiply(i, begin, end, states_.unprojected(), states_.unprojected_ld, sums,
                       [&](int64_t b, int rows, const S* block) {
                         put(panels_[i], b, rows, first + b * p_.tokens.stride(), block, states_.operand(s + 1));
                       });
  }

 private:
  void put(const typename Panels<S>::Panel& panel, int64_t b, int64_t rows, int64_t token, const S* sums,
           void* next) const {
    const int64_t P = p_.op.P, u = panel.unit;
    const auto& [wide, pairs, operand] = p_.types;
    const View from{.data = sums, .dtype = wide, .ld = panel.vectors * p_.kernels.lanes()};
    const auto copy = [&](const MutableView& to) { p_.kernels.rnn.copy(rows, panel.units, from, to, false); };
    copy({.data = states_.h.get() + b * P + u, .dtype = wide, .ld = P});
    copy({.data = at(next, b * states_.ld + u, operand), .dtype = operand, .ld = states_.ld});
    copy({.data = at(out_.y, token * P + u, p_.op.dtype), .dtype = p_.op.dtype, .ld = p_.tokens.stride() * P});
  }

  const RnnProblem<S>& p_;
  const RnnOutputs& out_;
  const States<S>& states_;
  Panels<S> panels_;
};

// What both loops hand to a cell, but for the step's own.
template <class S>
RnnForwardArgs arguments_of(const RnnProblem<S>& p, const RnnOutputs& out, const States<S>& states,
                            const Biases<S>& biases, const InputSums<S>& input) {
  const bool projected = p.op.weight_hr;
  return {.op = &p.op,
          .operand = p.types.operand,
          .gx = nullptr,
          .gx_ld = p.tokens.stride() * input.ld(),
          .hidden_bias = biases.hidden,
          .h = states.h.get(),
          .c = states.c.get(),
          .next = projected ? states.unprojected() : nullptr,
          .next_ld = projected ? states.unprojected_ld : states.ld,
          .y = out.y,
          .gates = out.gates,
          .cells = out.cells};
}

// The time loop: a cell follows the product of a panel, all gates of a few units.
template <class S>
class CellLoop {
 public:
  CellLoop(const RnnProblem<S>& p, const States<S>& states, const InputSums<S>& input, const Projection<S>& projection,
           const RnnForwardArgs& args)
      : p_(p), states_(states), input_(input), projection_(projection), args_(args), weights_(p) {
    const Rnn& op = p.op;
    const int64_t K = op.P / op.heads, units = op.H / op.heads;
    for (int64_t head = 0; head < op.heads; ++head)
      weights_.add({.w = op.weight_hh,
                    .ld = K,
                    .first = head * units,
                    .count = units,
                    .gates = static_cast<int>(gates_of(op.mode)),
                    .apart = op.H},
                   {{.k = 0, .depth = K, .column = head * K}});
    weights_.pack();
  }
  int64_t panels() const { return weights_.count(); }

  // One thread's part of steps [s0, s1).
  void run(int64_t s0, int64_t s1, const Partition& own, Barrier& barrier) const {
    alignas(64) S sums[kTile];
    RnnForwardArgs args = args_;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = p_.tokens.time(s), first = p_.tokens.first(t), stride = p_.tokens.stride();
      const int64_t begin = own.sequences.begin, end = std::min(own.sequences.end, p_.tokens.rows(t));
      if (!p_.op.weight_hr) args.next = states_.operand(s + 1);
      for (int64_t i = own.panels.begin; i < own.panels.end; ++i) {
        const auto& panel = weights_[i];
        input_.fetch(panel, first + begin * stride, end - begin);
        weights_.multiply(i, begin, end, states_.operand(s), states_.ld, sums, [&](int64_t b, int rows, S* block) {
          const int64_t token = first + b * stride;
          args.gx = input_.row(token);
          p_.kernels.rnn.forward(args,
                                 {.rows = rows,
                                  .b = b,
                                  .u = panel.unit,
                                  .units = panel.units,
                                  .step = s,
                                  .token = token,
                                  .stride = stride},
                                 block);
        });
      }
      if (p_.op.weight_hr) {
        barrier.wait();
        projection_.run(own.projected, s, begin, end, sums);
      }
      barrier.wait();
    }
  }

 private:
  const RnnProblem<S>& p_;
  const States<S>& states_;
  const InputSums<S>& input_;
  const Projection<S>& projection_;
  const RnnForwardArgs args_;
  Panels<S> weights_;
};

// The time loop of layer-normalised cells: the products of all gates of some sequences go to memory, the cell follows.
template <class S>
class NormedLoop {
 public:
  NormedLoop(const RnnProblem<S>& p, const States<S>& states, const InputSums<S>& input,
             const Projection<S>& projection, const RnnForwardArgs& args, const S* bias, void* normed, int threads)
      : p_(p),
        states_(states),
        input_(input),
        projection_(projection),
        args_(args),
        bias_(bias),
        normed_(normed),
        weights_(p),
        norms_(norms_of(p.op)),
        // Two vectors of units, and the products of a block of rows, where those are not kept.
        scratch_size_(2 * p.op.H + (normed ? 0 : kNormedRows * gates_of(p.op.mode) * p.op.H)),
        scratch_(threads * scratch_size_) {
    const Rnn& op = p.op;
    p.kernels.copy(norms_of(op), op.norms, op.dtype, norms_.get(), p.types.wide);
    if (in_place_) return;
    const int64_t K = op.P / op.heads, units = op.H / op.heads;
    for (int64_t head = 0; head < op.heads; ++head)
      for (int64_t g = 0; g < gates_of(op.mode); ++g)
        weights_.add({.w = op.weight_hh, .ld = K, .first = g * op.H + head * units, .count = units},
                     {{.k = 0, .depth = K, .column = head * K}});
    weights_.pack();
  }
  int64_t panels() const { return weights_.count(); }

  // One thread's sequences of steps [s0, s1).
  void run(int64_t s0, int64_t s1, const Partition& own, Barrier&) const {
    alignas(64) S sums[kTile];
    S* const scratch = scratch_.get() + own.thread * scratch_size_;
    const DType wide = p_.types.wide;
    const int64_t n = gates_of(p_.op.mode) * p_.op.H, stride = p_.tokens.stride(), ld = normed_of(p_.op);
    RnnForwardArgs args = args_;
    RnnNormArgs norm{.norms = norms_.get(),
                     .bias = bias_,
                     .input = nullptr,
                     .input_ld = stride * input_.ld(),
                     .hidden = scratch + 2 * p_.op.H,
                     .hidden_ld = normed_ ? stride * ld : n,
                     .deviation = nullptr,
                     .deviation_ld = stride * ld,
                     .scratch = scratch};
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = p_.tokens.time(s), first = p_.tokens.first(t);
      const int64_t end = std::min(own.sequences.end, p_.tokens.rows(t));
      if (!p_.op.weight_hr) args.next = states_.operand(s + 1);
      blocks(own.sequences.begin, end, kNormedRows, [&](int64_t b, int rows) {
        const int64_t token = first + b * stride;
        norm.input = input_.row(token);
        if (normed_) {
          norm.hidden = at(normed_, token * ld + n, wide);
          norm.deviation = at(norm.hidden, n + 1, wide);
        }
        multiply(states_.operand(s), b, rows, static_cast<S*>(norm.hidden), norm.hidden_ld, sums);
        p_.kernels.norm.forward(
            args, norm, {.rows = rows, .b = b, .u = 0, .units = p_.op.H, .step = s, .token = token, .stride = stride});
      });
      if (p_.op.weight_hr)
        projection_.run({.begin = 0, .end = projection_.panels()}, s, own.sequences.begin, end, sums);
    }
  }

 private:
  // to (rows, G H) = h W_hh^T of sequences from b on.
  void multiply(const void* h, int64_t b, int rows, S* to, int64_t to_ld, S* sums) const {
    const Rnn& op = p_.op;
    const DType wide = p_.types.wide;
    if (!in_place_) {
      for (int64_t i = 0; i < weights_.count(); ++i)
        weights_.multiply(i, b, b + rows, h, states_.ld, sums, [&](int64_t row, int some, const S* block) {
          const auto& panel = weights_[i];
          p_.kernels.rnn.copy(some, panel.units,
                              {.data = block, .dtype = wide, .ld = panel.vectors * p_.kernels.lanes()},
                              {.data = to + (row - b) * to_ld + panel.unit, .dtype = wide, .ld = to_ld}, false);
        });
      return;
    }
    const int64_t K = op.P / op.heads, units = op.H / op.heads;
    parallel_for(gates_of(op.mode) * op.heads, rows_in(1 << 17, K * units), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        p_.kernels.packing(p_.types.pairs)
            .dots(rows, units, K, at(h, b * states_.ld + i % op.heads * K, p_.types.operand), states_.ld,
                  {.data = at(op.weight_hh, i * units * K, op.dtype), .dtype = op.dtype, .ld = K}, to + i * units,
                  to_ld, false);
    });
  }

  const RnnProblem<S>& p_;
  const States<S>& states_;
  const InputSums<S>& input_;
  const Projection<S>& projection_;
  const RnnForwardArgs args_;
  const S* const bias_;
  void* const normed_;
  const bool in_place_ = few_tokens(p_.op);  // weights are read where they lie
  Panels<S> weights_;
  const Buffer<S> norms_;
  const int64_t scratch_size_;
  const Buffer<S> scratch_;  // of all threads
};

template <class S>
void forward(const Rnn& op, const RnnOutputs& out) {
  const RnnProblem<S> p(op);
  const States<S> states(p);
  const Biases<S> biases(p);
  const Projection<S> projection(p, out, states);
  const Plan plan(op);
  InputSums<S> input(p, out);
  const RnnForwardArgs args = arguments_of(p, out, states, biases, input);
  const auto run = [&](const auto& loop) {
    for (int64_t s = 0; s < op.T; s += input.steps()) {
      const int64_t end = std::min(op.T, s + input.steps());
      input.compute(s, end, biases);
      for_partitions(plan, p.tokens, loop.panels(), projection.panels(),
                     [&](const Partition& own, Barrier& barrier) { loop.run(s, end, own, barrier); });
    }
  };
  if (op.norms)
    run(NormedLoop<S>(p, states, input, projection, args, biases.gates, out.normed, plan.threads));
  else
    run(CellLoop<S>(p, states, input, projection, args));
  p.kernels.copy(op.B * op.P, states.h.get(), p.types.wide, out.hy, op.state_dtype);
  if (op.cx) p.kernels.copy(op.B * cells_of(op), states.c.get(), p.types.wide, out.cy, op.state_dtype);
}

}  // namespace
}  // namespace rnn

int64_t tokens_of(const Rnn& op) { return rnn::Tokens(op).total(); }

void rnn_forward(const Rnn& op, const RnnOutputs& out) {
  if (rnn::few_steps(op)) return rnn::run_steps(op, out);
  op.dtype == DType::f64 ? rnn::forward<double>(op, out) : rnn::forward<float>(op, out);
}

}  // namespace llmkern::cpu
