// Recurrent layers, backward: time from its end, then products over all of time.
//
// FLOPs: twice the forward's. In the time loop stands what no batching can take out of it, dh = dgates W_hh; dx =
// dgates W_ih, dW_ih = dgates^T x and dW_hh = dgates^T h follow as one product each. Of the loop's results only dgates
// are kept, in the type that these products want: bf16 where pairs of it are multiplied, else fp32 (fp64). tanh(c) is
// computed again. Threads share the work as in the forward; what they add up, they add up in the same order.
//
// h before a step is the y of another token: in dense sequences of one a fixed number of rows away, so that dW_hh is a
// product with y itself, and one of the first steps with hx.
//
// With norms the gradients of the products are others than those of the sums, dgates: those of U h are kept beside
// them, those of W x take their place after the loop, when what parameters get of dgates has been added up.
#include "core/rnn_gradients.h"

namespace llmkern::cpu {
namespace rnn {
namespace {

constexpr int64_t kSummed = 64;  // tokens that are added up before their sum is added to the others'

// The time loop: the cell of a step, then dh = dhidden W_hh for the step before.
template <class S>
class BackwardLoop {
 public:
  BackwardLoop(const RnnProblem<S>& p, const RnnCotangents& given, const RnnGradients& out,
               const StateGradients<S>& states, const TokenGradients<S>& tokens, const RowGradients<S>& rows)
      : p_(p), given_(given), states_(states), tokens_(tokens), weights_(p), projection_(p) {
    const Rnn& op = p.op;
    args_ = {.op = &op,
             .operand = p.types.operand,
             .dh = states.of_cell(),
             .dc = states.dc.get(),
             .dy = op.weight_hr ? nullptr : given.dy,
             .dcells = given.dcells,
             .y = given.y,
             .gates = given.gates,
             .cells = given.cells,
             .dgates = tokens.dgates().data,
             .unprojected = op.weight_hr && out.dweight_hr ? tokens.unprojected().data : nullptr,
             .dpeephole = out.dpeephole ? rows.dpeephole.get() : nullptr};
    norm_ = {.norms = rows.norms.get(),
             .normed = given.normed,
             .dhidden = tokens.dhidden().data,
             .dnorm_c = rows.dnorm_c.get()};
    const int64_t width = op.P / op.heads;
    for (int64_t head = 0; head < op.heads; ++head)
      weights_.add({.w = op.weight_hh, .ld = width, .by_rows = true, .first = head * width, .count = width},
                   chunks_of<S>(op, head));
    if (op.T > 1) weights_.pack();
    if (!op.weight_hr) return;
    projection_.add({.w = op.weight_hr, .ld = op.H, .by_rows = true, .count = op.H},
                    {{.k = 0, .depth = op.P, .column = 0}});
    projection_.pack();
  }

  void run() const {
    const Plan plan(p_.op);
    const int64_t size = p_.op.norms ? dgates_of(p_.op) + 3 * p_.op.H : 0;
    const Buffer<S> scratch(plan.threads * size);
    for_partitions(plan, p_.tokens, weights_.count(), projection_.count(), [&](const Partition& own, Barrier& barrier) {
      steps(own, scratch.get() + own.thread * size, barrier);
    });
  }

 private:
  // One thread's part. The cell's units are those of the panels that it is the gradient of.
  void steps(const Partition& own, S* norm_scratch, Barrier& barrier) const {
    alignas(64) S sums[kTile];
    RnnBackwardArgs args = args_;
    RnnNormBackwardArgs norm = norm_;
    norm.scratch = norm_scratch;
    const MutableView dhidden = tokens_.dhidden();
    const int64_t stride = p_.tokens.stride(), begin = own.sequences.begin;
    const Range units = p_.op.weight_hr ? projection_.units(own.projected) : weights_.units(own.panels);
    for (int64_t s = p_.op.T - 1; s >= 0; --s) {
      const int64_t t = p_.tokens.time(s), first = p_.tokens.first(t);
      const int64_t end = std::min(own.sequences.end, p_.tokens.rows(t));
      if (p_.op.weight_hr) project(own, begin, end, first, sums, barrier);
      if (units.begin < units.end) cells(args, norm, s, begin, end, units);
      barrier.wait();
      if (s == 0) break;
      for (int64_t i = own.panels.begin; i < own.panels.end; ++i)
        weights_.multiply(i, begin, end, at(dhidden.data, first * dhidden.ld, dhidden.dtype), stride * dhidden.ld, sums,
                          [&](int64_t b, int rows, const S* block) {
                            put(weights_[i], rows, block, states_.dh.get() + b * p_.op.P, p_.op.P, !p_.op.weight_hr);
                          });
    }
  }

  // dm = (dh + dy) W_hr, from and for the thread's units.
  void project(const Partition& own, int64_t begin, int64_t end, int64_t first, S* sums, Barrier& barrier) const {
    const int64_t P = p_.op.P, H = p_.op.H, stride = p_.tokens.stride();
    const MutableView to = tokens_.dprojected();
    const Range units = weights_.units(own.panels);
    const int64_t n = units.end - units.begin;
    if (n > 0 && begin < end) {
      const int64_t token = first + begin * stride;
      const MutableView dh{.data = states_.dh.get() + begin * P + units.begin, .dtype = p_.types.wide, .ld = P};
      p_.kernels.rnn.copy(
          end - begin, n,
          {.data = at(given_.dy, token * P + units.begin, p_.op.dtype), .dtype = p_.op.dtype, .ld = stride * P}, dh,
          true);
      p_.kernels.rnn.copy(
          end - begin, n, {.data = dh.data, .dtype = dh.dtype, .ld = dh.ld},
          {.data = at(to.data, token * to.ld + units.begin, to.dtype), .dtype = to.dtype, .ld = stride * to.ld}, false);
    }
    barrier.wait();
    for (int64_t i = own.projected.begin; i < own.projected.end; ++i)
      projection_.multiply(i, begin, end, at(to.data, first * to.ld, to.dtype), stride * to.ld, sums,
                           [&](int64_t b, int rows, const S* block) {
                             put(projection_[i], rows, block, states_.of_cell() + b * H, H, false);
                           });
  }

  // A block of a product's sums to, or added to, rows of the panel's units.
  void put(const typename Panels<S>::Panel& panel, int rows, const S* sums, S* to, int64_t ld, bool accumulate) const {
    p_.kernels.rnn.copy(rows, panel.units,
                        {.data = sums, .dtype = p_.types.wide, .ld = panel.vectors * p_.kernels.lanes()},
                        {.data = to + panel.unit, .dtype = p_.types.wide, .ld = ld}, accumulate);
  }

  // Step s of sequences [begin, end): those that have a step before it, then those that begin with it.
  void cells(RnnBackwardArgs& args, const RnnNormBackwardArgs& norm, int64_t s, int64_t begin, int64_t end,
             Range units) const {
    const int64_t first = p_.tokens.first(p_.tokens.time(s)), stride = p_.tokens.stride();
    const int64_t P = p_.op.P, C = cells_of(p_.op);
    const int64_t middle = std::clamp(p_.tokens.rows_before(s), begin, std::max(begin, end));
    const auto run = [&](int64_t b, int64_t last) {
      if (b >= last) return;
      const RnnBlock block{.rows = static_cast<int>(last - b),
                           .b = b,
                           .u = units.begin,
                           .units = units.end - units.begin,
                           .step = s,
                           .token = first + b * stride,
                           .stride = stride};
      p_.op.norms ? p_.kernels.norm.backward(args, norm, block) : p_.kernels.rnn.backward(args, block);
    };
    if (middle > begin) {
      const int64_t token = p_.tokens.first(p_.tokens.time(s - 1)) + begin * stride;
      args.h_before = at(args.y, token * P, p_.op.dtype);
      args.h_stride = stride * P;
      args.c_before = at(args.cells, token * C, p_.types.wide);
      args.c_stride = stride * C;
    }
    run(begin, middle);
    args.h_before = at(states_.h0.get(), middle * P, p_.op.dtype);
    args.h_stride = P;
    args.c_before = states_.c0.get() + middle * C;
    args.c_stride = C;
    run(middle, end);
  }

  const RnnProblem<S>& p_;
  const RnnCotangents& given_;
  const StateGradients<S>& states_;
  const TokenGradients<S>& tokens_;
  RnnBackwardArgs args_{};
  RnnNormBackwardArgs norm_{};
  Panels<S> weights_, projection_;
};

// The products over all of time, after the loop.
template <class S>
class TimeProducts {
 public:
  TimeProducts(const RnnProblem<S>& p, const RnnCotangents& given, const RnnGradients& out,
               const StateGradients<S>& states, const TokenGradients<S>& tokens, const RowGradients<S>& rows)
      : p_(p),
        given_(given),
        out_(out),
        states_(states),
        rows_(rows),
        dgates_(tokens.dgates()),
        dhidden_(tokens.dhidden()),
        dprojected_(tokens.dprojected()),
        unprojected_(tokens.unprojected()) {}

  void run() const {
    const Rnn& op = p_.op;
    const int64_t n = p_.tokens.total(), states = op.B * op.P, cells = op.B * cells_of(op);
    if (op.norms) input_norm();
    if (out_.dhx) {
      first_step();
      p_.kernels.copy(states, states_.dh.get(), p_.types.wide, out_.dhx, op.state_dtype);
    }
    if (out_.dcx) p_.kernels.copy(cells, states_.dc.get(), p_.types.wide, out_.dcx, op.state_dtype);
    if (out_.dx) {
      const Columns input = input_columns(op);
      gemm(n, op.I, input.count, operand(dgates_, input.column), {.data = op.weight_ih, .dtype = op.dtype, .ld = op.I},
           result(out_.dx, op.I), false);
    }
    if (out_.dweight_ih) weights();
    if (out_.dweight_hr)
      gemm(op.P, op.H, n, transposed(operand(dprojected_, 0)), operand(unprojected_, 0), result(out_.dweight_hr, op.H),
           false);
    if (out_.dpeephole)
      sum({.data = rows_.dpeephole.get(), .dtype = p_.types.wide, .ld = 3 * op.H}, op.B, 3 * op.H, out_.dpeephole);
  }

 private:
  // Operands of products: a matrix from its i-th element on.
  static Matrix operand(const MutableView& x, int64_t i) {
    return {.data = at(x.data, i, x.dtype), .dtype = x.dtype, .ld = x.ld};
  }
  static Matrix transposed(Matrix x) {
    x.transposed = !x.transposed;
    return x;
  }
  static Matrix strided(Matrix x, int64_t stride) {
    x.ld *= stride;
    return x;
  }
  MutableView result(void* to, int64_t ld) const { return {.data = to, .dtype = p_.op.dtype, .ld = ld}; }

  // What reaches hx by the first step's gates; one product, which needs no panels.
  void first_step() const {
    const Rnn& op = p_.op;
    const int64_t t = p_.tokens.time(0), n = p_.tokens.rows(t), width = op.P / op.heads;
    const int64_t row = p_.tokens.first(t) * dhidden_.ld;
    for (int64_t head = 0; head < op.heads; ++head) {
      bool accumulate = !op.weight_hr;
      for (const auto& chunk : chunks_of<S>(op, head)) {
        gemm(n, width, chunk.depth, strided(operand(dhidden_, row + chunk.column), p_.tokens.stride()),
             {.data = at(op.weight_hh, chunk.k * width, op.dtype), .dtype = op.dtype, .ld = width},
             {.data = states_.dh.get() + head * width, .dtype = p_.types.wide, .ld = op.P}, accumulate);
        accumulate = true;
      }
    }
  }

  void weights() const {
    const Rnn& op = p_.op;
    const int64_t n = p_.tokens.total(), I = op.I, P = op.P;
    const Columns input = input_columns(op);
    gemm(input.count, I, n, transposed(operand(dgates_, input.column)), {.data = op.x, .dtype = op.dtype, .ld = I},
         result(out_.dweight_ih, I), false);
    if (!op.norms) biases({.data = dgates_.data, .dtype = dgates_.dtype, .ld = dgates_.ld}, n);
    // dW_hh is taken from y itself, in two products, where their sum is not rounded on the way; batch first, a relu may
    // be infinite where it meets a zero.
    const bool shifted =
        !op.batch_sizes && op.dtype == p_.types.wide && !(op.batch_first && op.mode == RnnMode::rnn_relu);
    if (!shifted) {
      const Buffer<char> before(n * P * itemsize(op.dtype));
      gather(before.get());
      return hidden_weights(n, 0, before.get(), 1, false);
    }
    const int64_t first = p_.tokens.first(p_.tokens.time(0)), stride = p_.tokens.stride(), ld = dhidden_.ld;
    hidden_weights(op.B, first, states_.h0.get(), stride, false);
    if (op.T == 1) return;
    // Batch first, the row before a sequence's first is another's last: it meets zeros.
    const int64_t step = op.batch_first ? 1 : op.B;
    for (int64_t b = 0; op.batch_first && b < op.B; ++b)
      std::fill_n(at(dhidden_.data, (first + b * stride) * ld, dhidden_.dtype), ld * itemsize(dhidden_.dtype), 0);
    hidden_weights(n - step, op.reverse ? 0 : step, at(given_.y, op.reverse ? step * P : 0, op.dtype), 1, true);
  }

  // h before each token's step.
  void gather(void* before) const {
    const Rnn& op = p_.op;
    const int64_t P = op.P, stride = p_.tokens.stride();
    const auto put = [&](int64_t rows, const void* from, int64_t from_ld, int64_t token) {
      p_.kernels.rnn.copy(rows, P, {.data = from, .dtype = op.dtype, .ld = from_ld},
                          {.data = at(before, token * P, op.dtype), .dtype = op.dtype, .ld = stride * P}, false);
    };
    parallel_for(op.T, 8, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = p_.tokens.time(s), here = p_.tokens.first(t), n = p_.tokens.rows_before(s);
        if (n > 0) put(n, at(given_.y, p_.tokens.first(p_.tokens.time(s - 1)) * P, op.dtype), stride * P, here);
        put(p_.tokens.rows(t) - n, at(states_.h0.get(), n * P, op.dtype), P, here + n * stride);
      }
    });
  }

  // dW_hh = (or +=) dhidden^T h of n tokens, from `token` on and `stride` apart, and rows of h (n, P).
  void hidden_weights(int64_t n, int64_t token, const void* h, int64_t stride, bool accumulate) const {
    const Rnn& op = p_.op;
    const int64_t width = op.P / op.heads;
    for (int64_t head = 0; head < op.heads; ++head)
      for (const auto& chunk : chunks_of<S>(op, head))
        gemm(chunk.depth, width, n, transposed(strided(operand(dhidden_, token * dhidden_.ld + chunk.column), stride)),
             {.data = at(h, head * width, op.dtype), .dtype = op.dtype, .ld = op.P},
             result(at(out_.dweight_hh, chunk.k * width, op.dtype), width), accumulate);
  }

  // Sums of dgates over `rows` rows.
  void biases(const View& from, int64_t rows) const {
    const auto add = [&](const Columns& c, void* to) {
      sum({.data = at(from.data, c.column, from.dtype), .dtype = from.dtype, .ld = from.ld}, rows, c.count, to);
    };
    if (out_.dbias_ih) add(input_columns(p_.op), out_.dbias_ih);
    for (const Columns& c : hidden_columns(p_.op))
      if (out_.dbias_hh) add(c, at(out_.dbias_hh, c.row, p_.op.dtype));
  }

  // dgates become the gradients of W x, and parameters get what they get of them.
  void input_norm() const {
    const Rnn& op = p_.op;
    const DType wide = p_.types.wide;
    const int64_t n = p_.tokens.total(), count = ceil_div(n, kSummed), H = op.H;
    const int64_t weights = 2 * gates_of(op.mode) * H, width = weights + dgates_.ld;
    const bool wanted = out_.dweight_ih;
    const Buffer<S> sums(wanted ? count * width : 0);
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i * kSummed;
        S* const to = wanted ? sums.get() + i * width : nullptr;
        if (wanted) std::fill_n(to, width, S{0});
        p_.kernels.norm.input(op, dgates_.dtype, std::min(kSummed, n - token),
                              at(dgates_.data, token * dgates_.ld, dgates_.dtype),
                              at(given_.normed, token * normed_of(op), wide), rows_.norms.get(), to);
      }
    });
    if (!wanted) return;
    biases({.data = sums.get() + weights, .dtype = wide, .ld = width}, count);
    sum({.data = sums.get(), .dtype = wide, .ld = width}, count, weights, out_.dnorms);
    if (op.mode == RnnMode::lstm)
      sum({.data = rows_.dnorm_c.get(), .dtype = wide, .ld = 2 * H}, op.B, 2 * H, at(out_.dnorms, weights, op.dtype));
  }

  void sum(const View& from, int64_t rows, int64_t columns, void* to) const {
    parallel_for(columns, 256, [&](int64_t begin, int64_t end) {
      p_.kernels.rnn.sum_rows(from, rows, begin, end, {.data = to, .dtype = p_.op.dtype});
    });
  }

  const RnnProblem<S>& p_;
  const RnnCotangents& given_;
  const RnnGradients& out_;
  const StateGradients<S>& states_;
  const RowGradients<S>& rows_;
  const MutableView dgates_, dhidden_, dprojected_, unprojected_;
};

template <class S>
void backward(const Rnn& op, const RnnCotangents& given, const RnnGradients& out) {
  const RnnProblem<S> p(op);
  const StateGradients<S> states(p, given);
  const TokenGradients<S> tokens(p, out);
  const RowGradients<S> rows(p, out);
  BackwardLoop<S>(p, given, out, states, tokens, rows).run();
  TimeProducts<S>(p, given, out, states, tokens, rows).run();
}

}  // namespace
}  // namespace rnn

void rnn_backward(const Rnn& op, const RnnCotangents& given, const RnnGradients& out) {
  op.dtype == DType::f64 ? rnn::backward<double>(op, given, out) : rnn::backward<float>(op, given, out);
}

}  // namespace llmkern::cpu
