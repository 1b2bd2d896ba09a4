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
#include "core/rnn_loop.h"

namespace llmkern::cpu {
namespace rnn {
namespace {

constexpr int64_t kSummed = 64;  // tokens that are added up before their sum is added to the others'

// A block of columns of dgates that belongs to as many rows of the weights: gru keeps its two kinds apart.
struct Gates {
  int64_t row, count, column;
};

template <class S>
class Backward {
 public:
  Backward(const Rnn& op, const RnnBackwardArgs& args, const RnnNormBackwardArgs& norm, const RnnGradients& out)
      : op_(op),
        args_(args),
        norm_(norm),
        out_(out),
        weights_(kernels_, op.dtype, pairs_),
        projection_(kernels_, op.dtype, pairs_) {
    const int64_t H = op.H;
    if (op.mode == RnnMode::gru) {
      hidden_ = {{.row = 2 * H, .count = H, .column = 0}, {.row = 0, .count = 2 * H, .column = H}};
      input_ = {.row = 0, .count = 3 * H, .column = H};
    } else {
      hidden_ = {{.row = 0, .count = gates_of(op.mode) * H, .column = 0}};
      input_ = {.row = 0, .count = gates_of(op.mode) * H, .column = 0};
    }
  }

  void run(const void* dhy, const void* dcy) {
    const int64_t B = op_.B, H = op_.H, P = op_.P, C = cells_of(op_), n = tokens_.total(), D = dgates_of(op_);
    const bool projected = op_.weight_hr;
    const Buffer<S> dh(B * P), dm(projected ? B * H : 0), dc(B * C), c0(B * C);
    const Buffer<char> dgates(n * D * itemsize(operand_)), h0(B * P * itemsize(op_.dtype));
    const Buffer<char> before(out_.dweight_hh && !shifted_ ? n * P * itemsize(op_.dtype) : 0);
    const Buffer<char> dprojected(projected ? n * even(P) * itemsize(operand_) : 0);
    const Buffer<char> m(projected && out_.dweight_hr ? n * H * itemsize(op_.dtype) : 0);
    const Buffer<S> dpeephole(out_.dpeephole ? B * 3 * H : 0);
    const Buffer<S> norms(op_.norms ? norms_of(op_) : 0), dnorm_c(op_.norms ? B * 2 * H : 0);
    const Buffer<char> dhidden(op_.norms ? n * dhidden_of(op_) * itemsize(operand_) : 0);
    dh_ = dh.get();
    c0_ = c0.get();
    h0_ = h0.get();
    before_ = before.get();
    dprojected_ = dprojected.get();
    args_.op = &op_;
    args_.operand = operand_;
    args_.dh = projected ? dm.get() : dh.get();
    args_.dc = dc.get();
    args_.dgates = dgates.get();
    args_.unprojected = projected && out_.dweight_hr ? m.get() : nullptr;
    args_.dpeephole = out_.dpeephole ? dpeephole.get() : nullptr;
    norm_.norms = norms.get();
    norm_.dnorm_c = dnorm_c.get();
    norm_.dhidden = dhidden_ = op_.norms ? dhidden.get() : args_.dgates;
    dhidden_ld_ = op_.norms ? dhidden_of(op_) : D;
    if (op_.norms) kernels_.copy(norms_of(op_), op_.norms, op_.dtype, norms.get(), wide_);
    if (op_.norms) std::fill_n(dnorm_c.get(), B * 2 * H, S{0});
    dy_ = args_.dy;
    if (projected) args_.dy = nullptr;
    std::fill_n(dpeephole.get(), out_.dpeephole ? B * 3 * H : 0, S{0});
    load(B * P, dhy, dh_);
    if (op_.cx) {
      load(B * C, dcy, dc.get());
      load(B * C, op_.cx, c0_);
    }
    kernels_.copy(B * P, op_.hx, op_.state_dtype, h0_, op_.dtype);
    clear_padding();
    cut();
    time();
    if (op_.norms) input_norm();
    if (out_.dhx) {
      first_product();
      store(B * P, dh_, out_.dhx);
    }
    if (out_.dcx) store(B * C, dc.get(), out_.dcx);
    if (out_.dx)
      product(n, op_.I, input_.count, dgates_at(input_.column), D, false, op_.weight_ih, op_.I, false, out_.dx);
    if (out_.dweight_ih) weight_gradients();
    if (out_.dweight_hr)
      gemm(P, H, n, {.data = dprojected_, .dtype = operand_, .ld = even(P), .transposed = true},
           {.data = m.get(), .dtype = op_.dtype, .ld = H, .transposed = false}, out_.dweight_hr, op_.dtype, H, false);
    if (out_.dpeephole) sum(dpeephole.get(), wide_, B, 3 * H, 3 * H, out_.dpeephole);
  }

 private:
  const char* dgates_at(int64_t column) const { return at(static_cast<const void*>(args_.dgates), column, operand_); }
  const char* dhidden_at(int64_t i) const { return at(static_cast<const void*>(dhidden_), i, operand_); }
  void load(int64_t n, const void* from, S* to) const { kernels_.copy(n, from, op_.state_dtype, to, wide_); }
  void store(int64_t n, const S* from, void* to) const { kernels_.copy(n, from, wide_, to, op_.state_dtype); }

  // The columns that make rows of pairs even; they meet zeros, which must not be NaN's.
  void clear_padding() const {
    const auto clear = [&](void* rows, int64_t width, int64_t used) {
      for (int64_t i = 0; rows && used < width && i < tokens_.total(); ++i)
        std::fill_n(at(rows, i * width + used, operand_), (width - used) * itemsize(operand_), 0);
    };
    clear(args_.dgates, dgates_of(op_), dgates_used(op_));
    if (op_.norms) clear(dhidden_, dhidden_ld_, gates_of(op_.mode) * op_.H);
    if (op_.weight_hr) clear(dprojected_, even(op_.P), op_.P);
  }

  // W_hh for the loop, unless there is none, and W_hr.
  void cut() {
    const int64_t width = op_.P / op_.heads, units = op_.H / op_.heads;
    for (int64_t head = 0; head < op_.heads; ++head)
      weights_.add(op_.weight_hh, width, true, head * width, width, 1, 0, pieces(head, units));
    if (op_.T > 1) weights_.pack();
    if (!op_.weight_hr) return;
    projection_.add(op_.weight_hr, op_.H, true, 0, op_.H, 1, 0, {{0, op_.P, 0}});
    projection_.pack();
  }
  std::vector<typename Panels<S>::Piece> pieces(int64_t head, int64_t units) const {
    std::vector<typename Panels<S>::Piece> all;
    const std::vector<Gates> normed{{.row = 0, .count = gates_of(op_.mode) * op_.H, .column = 0}};
    for (const Gates& gates : op_.norms ? normed : hidden_) {
      if (op_.heads == 1) all.push_back({gates.row, gates.count, gates.column});
      for (int64_t g = 0; op_.heads > 1 && g < gates.count; g += op_.H)
        all.push_back({gates.row + g + head * units, units, gates.column + g + head * units});
    }
    return all;
  }

  void time() {
    const Plan plan(op_);
    const int64_t size = op_.norms ? dgates_of(op_) + 3 * op_.H : 0;
    const Buffer<S> scratch(plan.threads * size);
    share_out(plan, tokens_, weights_.count(), projection_.count(),
              [&](const Share& share, Barrier& barrier) { loop(share, scratch.get() + share.thread * size, barrier); });
  }

  // One thread's share. The cell's units are those of the panels that it is the gradient of.
  void loop(const Share& share, S* norm_scratch, Barrier& barrier) const {
    alignas(64) S sums[kTile];
    const auto& [thread, sequences, panels, projected] = share;
    RnnBackwardArgs args = args_;
    RnnNormBackwardArgs norm = norm_;
    norm.scratch = norm_scratch;
    const int64_t stride = tokens_.stride(), ld = dhidden_ld_;
    const Range units = op_.weight_hr ? projection_.units(projected) : weights_.units(panels);
    for (int64_t s = op_.T - 1; s >= 0; --s) {
      const int64_t t = tokens_.time(s), first = tokens_.first(t);
      const int64_t end = std::min(sequences.end, tokens_.rows(t));
      if (op_.weight_hr) project(sequences.begin, end, panels, projected, first, sums, barrier);
      if (units.begin < units.end) cells(args, norm, s, sequences.begin, end, units);
      barrier.wait();
      if (s == 0) break;
      for (int64_t p = panels.begin; p < panels.end; ++p)
        weights_.multiply(p, sequences.begin, end, dhidden_at(first * ld), operand_, stride * ld, sums,
                          [&](int64_t b, int rows, const S* block) {
                            put(weights_[p], rows, block, dh_ + b * op_.P, op_.P, !op_.weight_hr);
                          });
    }
  }

  // dm = (dh + dy) W_hr, from and for the thread's units.
  void project(int64_t begin, int64_t end, Range panels, Range projected, int64_t first, S* sums,
               Barrier& barrier) const {
    const int64_t P = op_.P, stride = tokens_.stride(), ld = even(P);
    const Range units = weights_.units(panels);
    const int64_t n = units.end - units.begin;
    if (n > 0 && begin < end) {
      S* const dh = dh_ + begin * P + units.begin;
      const int64_t token = first + begin * stride;
      kernels_.rnn.copy(end - begin, n, at(dy_, token * P + units.begin, op_.dtype), op_.dtype, stride * P, dh, wide_,
                        P, true);
      kernels_.rnn.copy(end - begin, n, dh, wide_, P, at(dprojected_, token * ld + units.begin, operand_), operand_,
                        stride * ld, false);
    }
    barrier.wait();
    for (int64_t p = projected.begin; p < projected.end; ++p)
      projection_.multiply(p, begin, end, at(dprojected_, first * ld, operand_), operand_, stride * ld, sums,
                           [&](int64_t b, int rows, const S* block) {
                             put(projection_[p], rows, block, static_cast<S*>(args_.dh) + b * op_.H, op_.H, false);
                           });
  }

  // A block of a product's sums to, or added to, rows of the panel's units.
  void put(const typename Panels<S>::Panel& panel, int rows, const S* sums, S* to, int64_t ld, bool accumulate) const {
    kernels_.rnn.copy(rows, panel.units, sums, wide_, panel.vectors * kernels_.lanes(), to + panel.unit, wide_, ld,
                      accumulate);
  }

  // Step s of sequences [begin, end): those that have a step before it, then those that begin with it.
  void cells(RnnBackwardArgs& args, const RnnNormBackwardArgs& norm, int64_t s, int64_t begin, int64_t end,
             Range units) const {
    const int64_t first = tokens_.first(tokens_.time(s)), stride = tokens_.stride();
    const int64_t P = op_.P, C = cells_of(op_);
    const int64_t middle = std::clamp(tokens_.rows_before(s), begin, std::max(begin, end));
    const auto run = [&](int64_t b, int64_t last) {
      if (b >= last) return;
      const RnnBlock block{.rows = static_cast<int>(last - b),
                           .b = b,
                           .u = units.begin,
                           .units = units.end - units.begin,
                           .step = s,
                           .token = first + b * stride,
                           .stride = stride};
      op_.norms ? kernels_.norm.backward(args, norm, block) : kernels_.rnn.backward(args, block);
    };
    if (middle > begin) {
      const int64_t token = tokens_.first(tokens_.time(s - 1)) + begin * stride;
      args.h_before = at(args_.y, token * P, op_.dtype);
      args.h_stride = stride * P;
      args.c_before = at(args_.cells, token * C, wide_);
      args.c_stride = stride * C;
    }
    run(begin, middle);
    args.h_before = at(h0_, middle * P, op_.dtype);
    args.h_stride = P;
    args.c_before = c0_ + middle * C;
    args.c_stride = C;
    run(middle, end);
  }

  // What reaches hx by the first step's gates; one product, which needs no panels.
  void first_product() const {
    const int64_t t = tokens_.time(0), n = tokens_.rows(t), P = op_.P, width = P / op_.heads, units = op_.H / op_.heads;
    const int64_t row = tokens_.first(t) * dhidden_ld_, ld = tokens_.stride() * dhidden_ld_;
    bool accumulate = !op_.weight_hr;
    for (int64_t head = 0; head < op_.heads; ++head, accumulate = !op_.weight_hr)
      for (const auto& piece : pieces(head, units)) {
        gemm(n, width, piece.depth, {dhidden_at(row + piece.column), operand_, ld, false},
             {at(op_.weight_hh, piece.k * width, op_.dtype), op_.dtype, width, false}, dh_ + head * width, wide_, P,
             accumulate);
        accumulate = true;
      }
  }

  // h before each token's step.
  void gather() const {
    const int64_t P = op_.P, stride = tokens_.stride();
    const auto put = [&](int64_t rows, const void* from, int64_t from_ld, int64_t token) {
      kernels_.rnn.copy(rows, P, from, op_.dtype, from_ld, at(before_, token * P, op_.dtype), op_.dtype, stride * P,
                        false);
    };
    parallel_for(op_.T, 8, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = tokens_.time(s), here = tokens_.first(t), n = tokens_.rows_before(s);
        if (n > 0) put(n, at(args_.y, tokens_.first(tokens_.time(s - 1)) * P, op_.dtype), stride * P, here);
        put(tokens_.rows(t) - n, at(h0_, n * P, op_.dtype), P, here + n * stride);
      }
    });
  }
  void weight_gradients() const {
    const int64_t n = tokens_.total(), D = dgates_of(op_), I = op_.I;
    product(input_.count, I, n, dgates_at(input_.column), D, true, op_.x, I, false, out_.dweight_ih);
    if (!op_.norms) biases(args_.dgates, operand_, n, D);
    if (!shifted_) {
      gather();
      return hidden_gradient(n, 0, before_, 1, false);
    }
    const int64_t first = tokens_.first(tokens_.time(0)), stride = tokens_.stride(), P = op_.P;
    hidden_gradient(op_.B, first, h0_, stride, false);
    if (op_.T == 1) return;
    // Batch first, the row before a sequence's first is another's last: it meets zeros.
    const int64_t step = op_.batch_first ? 1 : op_.B;
    for (int64_t b = 0; op_.batch_first && b < op_.B; ++b)
      std::fill_n(at(dhidden_, (first + b * stride) * dhidden_ld_, operand_), dhidden_ld_ * itemsize(operand_), 0);
    hidden_gradient(n - step, op_.reverse ? 0 : step, at(args_.y, op_.reverse ? step * P : 0, op_.dtype), 1, true);
  }
  // dW_hh = (or +=) dhidden^T h of n tokens, from `token` on and `stride` apart, and rows of h (n, P).
  void hidden_gradient(int64_t n, int64_t token, const void* h, int64_t stride, bool accumulate) const {
    const int64_t ld = dhidden_ld_, width = op_.P / op_.heads;
    for (int64_t head = 0; head < op_.heads; ++head)
      for (const auto& piece : pieces(head, op_.H / op_.heads))
        gemm(piece.depth, width, n, {dhidden_at(token * ld + piece.column), operand_, stride * ld, true},
             {at(h, head * width, op_.dtype), op_.dtype, op_.P, false}, at(out_.dweight_hh, piece.k * width, op_.dtype),
             op_.dtype, width, accumulate);
  }

  // Sums of all dgates, from (n, D).
  void biases(const void* from, DType dtype, int64_t n, int64_t D) const {
    if (out_.dbias_ih) sum(at(from, input_.column, dtype), dtype, n, D, input_.count, out_.dbias_ih);
    for (const Gates& gates : hidden_)
      if (out_.dbias_hh)
        sum(at(from, gates.column, dtype), dtype, n, D, gates.count, at(out_.dbias_hh, gates.row, op_.dtype));
  }

  // dgates become the gradients of W x, and parameters get what they get of them.
  void input_norm() const {
    const int64_t n = tokens_.total(), D = dgates_of(op_), count = ceil_div(n, kSummed), H = op_.H;
    const int64_t weights = 2 * gates_of(op_.mode) * H, width = weights + D;
    const bool wanted = out_.dweight_ih;
    const Buffer<S> sums(wanted ? count * width : 0);
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i * kSummed;
        S* const to = wanted ? sums.get() + i * width : nullptr;
        if (wanted) std::fill_n(to, width, S{0});
        kernels_.norm.input(op_, operand_, std::min(kSummed, n - token), at(args_.dgates, token * D, operand_),
                            at(norm_.normed, token * normed_of(op_), wide_), norm_.norms, to);
      }
    });
    if (!wanted) return;
    biases(sums.get() + weights, wide_, count, width);
    sum(sums.get(), wide_, count, width, weights, out_.dnorms);
    if (op_.mode == RnnMode::lstm) sum(norm_.dnorm_c, wide_, op_.B, 2 * H, 2 * H, at(out_.dnorms, weights, op_.dtype));
  }

  // C (M, N) of dtype, dense, = dgates' (M, K) or their transpose times B.
  void product(int64_t M, int64_t N, int64_t K, const void* dgates, int64_t ld, bool transposed, const void* B,
               int64_t ldb, bool b_transposed, void* C) const {
    gemm(M, N, K, {.data = dgates, .dtype = operand_, .ld = ld, .transposed = transposed},
         {.data = B, .dtype = op_.dtype, .ld = ldb, .transposed = b_transposed}, C, op_.dtype, N, false);
  }

  void sum(const void* from, DType dtype, int64_t rows, int64_t ld, int64_t columns, void* to) const {
    parallel_for(columns, 256, [&](int64_t begin, int64_t end) {
      kernels_.rnn.sum_rows(from, dtype, rows, ld, begin, end, to, op_.dtype);
    });
  }

  const Rnn& op_;
  RnnBackwardArgs args_;
  RnnNormBackwardArgs norm_;
  const RnnGradients& out_;
  const DType wide_ = accum_of(op_.dtype);
  const Kernels<S> kernels_{};
  const Tokens tokens_{op_};
  const bool pairs_ = in_pairs(op_);
  const DType operand_ = pairs_ ? DType::bf16 : wide_;
  // Whether dW_hh is taken from y itself, in two products: their sum must not be rounded on the way. Batch first, a
  // relu may be infinite where it meets a zero.
  const bool shifted_ = !op_.batch_sizes && op_.dtype == wide_ && !(op_.batch_first && op_.mode == RnnMode::rnn_relu);
  Panels<S> weights_, projection_;
  std::vector<Gates> hidden_;
  Gates input_{};
  const void* dy_ = nullptr;
  void* dhidden_ = nullptr;  // the gradients of U h: without norms, dgates
  int64_t dhidden_ld_ = 0;
  S *dh_ = nullptr, *c0_ = nullptr;
  char *h0_ = nullptr, *before_ = nullptr, *dprojected_ = nullptr;
};

}  // namespace
}  // namespace rnn

void rnn_backward(const Rnn& op, const void* dy, const void* dcells, const void* dhy, const void* dcy, const void* y,
                  const void* gates, const void* cells, const void* normed, const RnnGradients& out) {
  RnnBackwardArgs args{};
  RnnNormBackwardArgs norm{};
  norm.normed = normed;
  args.dy = dy;
  args.dcells = dcells;
  args.y = y;
  args.gates = gates;
  args.cells = cells;
  if (op.dtype == DType::f64)
    rnn::Backward<double>(op, args, norm, out).run(dhy, dcy);
  else
    rnn::Backward<float>(op, args, norm, out).run(dhy, dcy);
}

}  // namespace llmkern::cpu
