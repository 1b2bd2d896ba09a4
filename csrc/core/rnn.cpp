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

#include "core/rnn_loop.h"

namespace llmkern::cpu {
namespace rnn {
namespace {

constexpr int64_t kScratchBytes = 16 << 20;  // of x W_ih^T
constexpr int64_t kNormedRows = 64;          // that share what a panel's load costs, and whose sums lie in L2

template <class S>
class Forward {
 public:
  Forward(const Rnn& op, void* y, void* hy, void* cy, void* gates, void* cells, void* normed)
      : op_(op),
        tokens_(op),
        pairs_(in_pairs(op)),
        operand_(pairs_ ? DType::bf16 : wide_),
        weights_(kernels_, op.dtype, pairs_),
        projection_(kernels_, op.dtype, pairs_),
        y_(y),
        hy_(hy),
        cy_(cy),
        gates_(gates),
        cells_(cells),
        normed_(normed) {}

  void run() {
    const int64_t H = op_.H, P = op_.P, B = op_.B, G = gates_of(op_.mode);
    const Buffer<S> h(B * P), c(B * cells_of(op_)), bias(G * H + H), norms(op_.norms ? norms_of(op_) : 0);
    const int64_t ld = even(P), ld_m = even(H);
    const Buffer<char> operands(2 * B * ld * itemsize(operand_)), m(op_.weight_hr ? B * ld_m * itemsize(operand_) : 0);
    h_ = h.get();
    c_ = c.get();
    m_ = op_.weight_hr ? m.get() : nullptr;
    ld_ = ld;
    ld_m_ = ld_m;
    operands_[0] = operands.get();
    operands_[1] = at(operands.get(), B * ld, operand_);
    begin();
    if (!in_place_weights_) cut();
    if (op_.weight_hr) cut_projection();
    merge_biases(op_, kernels_, bias.get());
    if (op_.bias_ih || op_.bias_hh || op_.norms) bias_ = bias.get();
    if (op_.norms) {
      kernels_.copy(norms_of(op_), op_.norms, op_.dtype, norms.get(), wide_);
      norms_ = norms.get();
    }
    if (op_.bias_hh && op_.mode == RnnMode::gru) hidden_bias_ = bias.get() + G * H;
    const Plan plan(op_);
    const int64_t gx_size = G * H, chunk = steps_per_chunk(gx_size);
    const Buffer<char> scratch(in_place() ? 0 : most_rows(chunk) * gx_size * itemsize(wide_));
    const Buffer<S> norm_scratch(op_.norms ? plan.threads * norm_scratch_size() : 0);
    norm_scratch_ = norm_scratch.get();
    for (int64_t s = 0; s < op_.T; s += chunk) steps(plan, s, std::min(op_.T, s + chunk), scratch.get());
    kernels_.copy(B * P, h.get(), wide_, hy_, op_.state_dtype);
    if (op_.cx) kernels_.copy(B * cells_of(op_), c.get(), wide_, cy_, op_.state_dtype);
  }

 private:
  // The states before the first step. Both operands, because sequences may begin at any step.
  void begin() {
    kernels_.copy(op_.B * op_.P, op_.hx, op_.state_dtype, h_, wide_);
    if (op_.cx) kernels_.copy(op_.B * cells_of(op_), op_.cx, op_.state_dtype, c_, wide_);
    for (void* operand : operands_) {
      std::fill_n(static_cast<char*>(operand), op_.B * ld_ * itemsize(operand_), 0);
      kernels_.rnn.copy(op_.B, op_.P, h_, wide_, op_.P, operand, operand_, ld_, false);
    }
    if (m_) std::fill_n(static_cast<char*>(m_), op_.B * ld_m_ * itemsize(operand_), 0);
  }

  // Panels of all gates of a few units; for norms, which take gate by gate, of rows of W_hh.
  void cut() {
    const int64_t G = gates_of(op_.mode), H = op_.H, K = op_.P / op_.heads, units = H / op_.heads;
    for (int64_t head = 0; head < op_.heads; ++head)
      if (!op_.norms)
        weights_.add(op_.weight_hh, K, false, head * units, units, static_cast<int>(G), H, {{0, K, head * K}});
      else
        for (int64_t g = 0; g < G; ++g)
          weights_.add(op_.weight_hh, K, false, g * H + head * units, units, 1, 0, {{0, K, head * K}});
    weights_.pack();
  }
  void cut_projection() {
    projection_.add(op_.weight_hr, op_.H, false, 0, op_.P, 1, 0, {{0, op_.H, 0}});
    projection_.pack();
  }

  // Where x W_ih^T may lie until the cell takes it: a row's own place, because the cell reads before it writes.
  bool in_place() const {
    return op_.norms ? normed_ != nullptr : op_.dtype == wide_ && (gates_ || gates_of(op_.mode) == 1);
  }
  int64_t steps_per_chunk(int64_t gx_size) const {
    const int64_t bytes = op_.B * gx_size * itemsize(wide_);
    return in_place() || op_.batch_first ? op_.T : std::clamp<int64_t>(kScratchBytes / bytes, 1, op_.T);
  }
  int64_t most_rows(int64_t chunk) const {
    return op_.batch_first ? tokens_.total() : std::min(tokens_.total(), chunk * op_.B);
  }

  // Steps [s0, s1).
  void steps(const Plan& plan, int64_t s0, int64_t s1, void* scratch) {
    const int64_t G = gates_of(op_.mode), t0 = std::min(tokens_.time(s0), tokens_.time(s1 - 1)), all = op_.batch_first;
    const int64_t first = all ? 0 : tokens_.first(t0), last = all ? tokens_.total() : end_of(t0 + s1 - s0);
    gx_ = !in_place() ? scratch : op_.norms ? normed_ : gates_ ? gates_ : y_;
    gx_ld_ = !in_place() || !(normed_ || gates_) ? G * op_.H : op_.norms ? normed_of(op_) : saved_of(op_) * op_.H;
    gx_first_ = in_place() ? 0 : first;
    gemm(last - first, G * op_.H, op_.I, {at(op_.x, first * op_.I, op_.dtype), op_.dtype, op_.I, false},
         {op_.weight_ih, op_.dtype, op_.I, true}, at(gx_, (first - gx_first_) * gx_ld_, wide_), wide_, gx_ld_, false,
         op_.norms ? nullptr : bias_);
    if (op_.norms) normalise(first, last);
    share_out(plan, tokens_, weights_.count(), projection_.count(), [&](const Share& share, Barrier& barrier) {
      if (op_.norms)
        normalised_loop(s0, s1, share.sequences, norm_scratch_ + share.thread * norm_scratch_size());
      else
        loop(s0, s1, share, barrier);
    });
  }
  int64_t end_of(int64_t t) const { return t == op_.T ? tokens_.total() : tokens_.first(t); }

  // One thread's share of steps [s0, s1).
  void loop(int64_t s0, int64_t s1, const Share& share, Barrier& barrier) {
    alignas(64) S sums[kTile];
    const auto& [thread, sequences, panels, projected] = share;
    RnnForwardArgs args = arguments();
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = tokens_.time(s), first = tokens_.first(t), stride = tokens_.stride();
      const int64_t end = std::min(sequences.end, tokens_.rows(t));
      if (!op_.weight_hr) args.next = operands_[(s + 1) % 2];
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const auto& panel = weights_[p];
        fetch(panel, first + sequences.begin * stride, end - sequences.begin);
        weights_.multiply(p, sequences.begin, end, operands_[s % 2], operand_, ld_, sums,
                          [&](int64_t b, int rows, S* block) {
                            const int64_t token = first + b * stride;
                            args.gx = at(gx_, (token - gx_first_) * gx_ld_, wide_);
                            kernels_.rnn.forward(args, {rows, b, panel.unit, panel.units, s, token, stride}, block);
                          });
      }
      if (op_.weight_hr) {
        barrier.wait();
        project(projected, s, sequences.begin, end, sums);
      }
      barrier.wait();
    }
  }
  RnnForwardArgs arguments() const {
    return {&op_, operand_, nullptr, tokens_.stride() * gx_ld_, hidden_bias_, h_, c_, m_, op_.weight_hr ? ld_m_ : ld_,
            y_,   gates_,   cells_};
  }

  // Of x W_ih^T of tokens [first, last).
  void normalise(int64_t first, int64_t last) const {
    const int64_t n = gates_of(op_.mode) * op_.H;
    parallel_for(last - first, std::max<int64_t>(1, (1 << 14) / n), [&](int64_t begin, int64_t end) {
      void* const x = at(gx_, (first + begin - gx_first_) * gx_ld_, wide_);
      kernels_.norm.normalise(wide_, end - begin, n, x, gx_ld_, normed_ ? at(x, 2 * n, wide_) : nullptr, gx_ld_);
    });
  }

  // A thread's: two vectors of units, and the products of a block of rows, where those are not kept.
  int64_t norm_scratch_size() const { return 2 * op_.H + (normed_ ? 0 : kNormedRows * gates_of(op_.mode) * op_.H); }

  // One thread's sequences of steps [s0, s1) of layer-normalised cells.
  void normalised_loop(int64_t s0, int64_t s1, Range sequences, S* scratch) {
    alignas(64) S sums[kTile];
    const int64_t n = gates_of(op_.mode) * op_.H, stride = tokens_.stride(), ld = normed_of(op_);
    RnnForwardArgs args = arguments();
    RnnNormArgs norm{norms_,  bias_,       nullptr, stride * gx_ld_, scratch + 2 * op_.H, normed_ ? stride * ld : n,
                     nullptr, stride * ld, scratch};
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = tokens_.time(s), first = tokens_.first(t), end = std::min(sequences.end, tokens_.rows(t));
      if (!op_.weight_hr) args.next = operands_[(s + 1) % 2];
      blocks(sequences.begin, end, kNormedRows, [&](int64_t b, int rows) {
        const int64_t token = first + b * stride;
        norm.input = at(gx_, (token - gx_first_) * gx_ld_, wide_);
        if (normed_) {
          norm.hidden = at(normed_, token * ld + n, wide_);
          norm.deviation = at(norm.hidden, n + 1, wide_);
        }
        multiply(operands_[s % 2], b, rows, static_cast<S*>(norm.hidden), norm.hidden_ld, sums);
        kernels_.norm.forward(args, norm, {rows, b, 0, op_.H, s, token, stride});
      });
      if (op_.weight_hr) project({0, projection_.count()}, s, sequences.begin, end, sums);
    }
  }

  // to (rows, G H) = h W_hh^T of sequences from b on. A few tokens read the weights where they lie.
  void multiply(const void* h, int64_t b, int rows, S* to, int64_t to_ld, S* sums) const {
    if (!in_place_weights_) {
      for (int64_t p = 0; p < weights_.count(); ++p)
        weights_.multiply(p, b, b + rows, h, operand_, ld_, sums, [&](int64_t row, int some, const S* block) {
          kernels_.rnn.copy(some, weights_[p].units, block, wide_, weights_[p].vectors * kernels_.lanes(),
                            to + (row - b) * to_ld + weights_[p].unit, wide_, to_ld, false);
        });
      return;
    }
    const int64_t K = op_.P / op_.heads, units = op_.H / op_.heads;
    parallel_for(gates_of(op_.mode) * op_.heads, std::max<int64_t>(1, (1 << 17) / (K * units)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     kernels_.packing(pairs_).dots(rows, units, K, at(h, b * ld_ + i % op_.heads * K, operand_), ld_,
                                                   at(op_.weight_hh, i * units * K, op_.dtype), op_.dtype, K,
                                                   to + i * units, to_ld, false);
                 });
  }

  // What the cell will read of x W_ih^T is on its way from memory while the product runs.
  void fetch(const typename Panels<S>::Panel& panel, int64_t token, int64_t rows) const {
    const int64_t G = gates_of(op_.mode), lines = G > 1 ? G : panel.vectors, apart = G > 1 ? op_.H : kernels_.lanes();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < lines; ++i)
        __builtin_prefetch(
            at(gx_, (token + row * tokens_.stride() - gx_first_) * gx_ld_ + panel.unit + i * apart, wide_));
  }

  // The projection of h of sequences [begin, end) of step s, from and for the panels `projected`.
  void project(Range projected, int64_t s, int64_t begin, int64_t end, S* sums) const {
    const int64_t first = tokens_.first(tokens_.time(s));
    for (int64_t p = projected.begin; p < projected.end; ++p)
      projection_.multiply(p, begin, end, m_, operand_, ld_m_, sums, [&](int64_t b, int rows, const S* block) {
        put(projection_[p], b, rows, first + b * tokens_.stride(), block, operands_[(s + 1) % 2]);
      });
  }

  // The projected h of a few sequences to wherever it goes.
  void put(const typename Panels<S>::Panel& panel, int64_t b, int64_t rows, int64_t token, const S* sums,
           void* next) const {
    const int64_t ld = panel.vectors * kernels_.lanes(), P = op_.P, u = panel.unit, n = panel.units;
    kernels_.rnn.copy(rows, n, sums, wide_, ld, h_ + b * P + u, wide_, P, false);
    kernels_.rnn.copy(rows, n, sums, wide_, ld, at(next, b * ld_ + u, operand_), operand_, ld_, false);
    kernels_.rnn.copy(rows, n, sums, wide_, ld, at(y_, token * P + u, op_.dtype), op_.dtype, tokens_.stride() * P,
                      false);
  }

  const Rnn& op_;
  const DType wide_ = accum_of(op_.dtype);
  const Kernels<S> kernels_{};
  const Tokens tokens_;
  const bool pairs_;
  const DType operand_;  // of the loop's products
  const bool in_place_weights_ = op_.norms && few_tokens(op_);
  Panels<S> weights_, projection_;
  void *y_, *hy_, *cy_, *gates_, *cells_, *normed_;
  S *h_ = nullptr, *c_ = nullptr;
  const S *bias_ = nullptr, *hidden_bias_ = nullptr, *norms_ = nullptr;
  S* norm_scratch_ = nullptr;  // of every thread
  void *operands_[2], *m_ = nullptr;
  int64_t ld_ = 0, ld_m_ = 0;
  void* gx_ = nullptr;
  int64_t gx_ld_ = 0, gx_first_ = 0;
};

}  // namespace
}  // namespace rnn

int64_t tokens_of(const Rnn& op) { return rnn::Tokens(op).total(); }

void rnn_forward(const Rnn& op, void* y, void* hy, void* cy, void* gates, void* cells, void* normed) {
  if (rnn::few_steps(op)) return rnn::run_steps(op, y, hy, cy, gates, cells);
  if (op.dtype == DType::f64)
    rnn::Forward<double>(op, y, hy, cy, gates, cells, normed).run();
  else
    rnn::Forward<float>(op, y, hy, cy, gates, cells, normed).run();
}

}  // namespace llmkern::cpu
