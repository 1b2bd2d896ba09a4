// What the steps of a recurrent layer's forward read and write: states, and the sums over the inputs. See rnn.cpp.
#pragma once
#include "core/rnn_loop.h"

namespace llmkern::cpu::rnn {

// h and c between two steps, and h as the operand of the next product.
template <class S>
class States {
 public:
  explicit States(const RnnProblem<S>& p)
      : h(p.op.B * p.op.P),
        c(p.op.B * cells_of(p.op)),
        ld(even(p.op.P)),
        unprojected_ld(even(p.op.H)),
        bytes_(p.op.B * ld * itemsize(p.types.operand)),
        unprojected_bytes_(p.op.weight_hr ? p.op.B * unprojected_ld * itemsize(p.types.operand) : 0),
        operands_(2 * bytes_),
        unprojected_(unprojected_bytes_) {
    const Rnn& op = p.op;
    const DType wide = p.types.wide;
    p.kernels.copy(op.B * op.P, op.hx, op.state_dtype, h.get(), wide);
    if (op.cx) p.kernels.copy(op.B * cells_of(op), op.cx, op.state_dtype, c.get(), wide);
    // Both places, because sequences may begin at any step.
    std::fill_n(operands_.get(), 2 * bytes_, 0);
    for (int64_t s : {0, 1})
      p.kernels.rnn.copy(op.B, op.P, {.data = h.get(), .dtype = wide, .ld = op.P},
                         {.data = operand(s), .dtype = p.types.operand, .ld = ld}, false);
    std::fill_n(unprojected_.get(), unprojected_bytes_, 0);
  }
  // (B, ld): what step s multiplies. A double buffer: a step writes the other place.
  char* operand(int64_t s) const { return operands_.get() + s % 2 * bytes_; }
  // (B, unprojected_ld): h before its projection.
  char* unprojected() const { return unprojected_.get(); }

  const Buffer<S> h, c;
  const int64_t ld, unprojected_ld;

 private:
  const int64_t bytes_, unprojected_bytes_;
  const Buffer<char> operands_, unprojected_;
};

// What the sums of gates start from, in S; null where there is nothing to add.
template <class S>
class Biases {
 public:
  explicit Biases(const RnnProblem<S>& p) : merged_((gates_of(p.op.mode) + 1) * p.op.H) {
    const Rnn& op = p.op;
    merge_biases(p, merged_.get());
    if (op.bias_ih || op.bias_hh || op.norms) gates = merged_.get();
    if (op.bias_hh && op.mode == RnnMode::gru) hidden = merged_.get() + gates_of(op.mode) * op.H;
  }
  const S *gates = nullptr, *hidden = nullptr;  // (G H); (H), of gru's W_hn h

 private:
  const Buffer<S> merged_;
};

// x W_ih^T + b of a chunk of steps. It lies where a cell will write what is saved of its gates (or y, if there is one
// gate), if their type is that of sums, because a cell reads an element before it writes it; with norms where its
// normalised form is saved; else in scratch.
template <class S>
class InputSums {
  static constexpr int64_t kScratchBytes = 16 << 20;

 public:
  InputSums(const RnnProblem<S>& p, const RnnOutputs& out)
      : p_(p), width_(gates_of(p.op.mode) * p.op.H), steps_(p.op.T), ld_(width_), scratch_(0) {
    const Rnn& op = p.op;
    if (op.norms && out.normed) {
      data_ = out.normed;
      ld_ = normed_of(op);
      deviations_ = true;
    } else if (!op.norms && op.dtype == p.types.wide && out.gates) {
      data_ = out.gates;
      ld_ = saved_of(op) * op.H;
    } else if (!op.norms && op.dtype == p.types.wide && gates_of(op.mode) == 1) {
      data_ = out.y;
    }
    if (data_) return;
    in_scratch_ = true;
    const int64_t bytes = op.B * width_ * itemsize(p.types.wide);
    if (!op.batch_first) steps_ = std::clamp<int64_t>(kScratchBytes / bytes, 1, op.T);
    scratch_ = Buffer<S>(std::min(p.tokens.total(), op.batch_first ? p.tokens.total() : steps_ * op.B) * width_);
    data_ = scratch_.get();
  }

  // Of a chunk.
  int64_t steps() const { return steps_; }
  int64_t ld() const { return ld_; }
  char* row(int64_t token) const { return at(data_, (token - first_) * ld_, p_.types.wide); }

  // For steps [s0, s1).
  void compute(int64_t s0, int64_t s1, const Biases<S>& biases) {
    const Rnn& op = p_.op;
    const int64_t t0 = std::min(p_.tokens.time(s0), p_.tokens.time(s1 - 1));
    const int64_t first = op.batch_first ? 0 : p_.tokens.first(t0);
    const int64_t last = op.batch_first ? p_.tokens.total() : p_.tokens.first(t0 + s1 - s0);
    first_ = in_scratch_ ? first : 0;
    gemm(last - first, width_, op.I, {.data = at(op.x, first * op.I, op.dtype), .dtype = op.dtype, .ld = op.I},
         {.data = op.weight_ih, .dtype = op.dtype, .ld = op.I, .transposed = true},
         {.data = row(first), .dtype = p_.types.wide, .ld = ld_}, false, op.norms ? nullptr : biases.gates);
    if (op.norms) normalise(first, last);
  }

  // Of sequences from `token` on: what the cell will read for a panel is on its way from memory while the product runs.
  void fetch(const typename Panels<S>::Panel& panel, int64_t token, int64_t rows) const {
    const int64_t G = gates_of(p_.op.mode), lines = G > 1 ? G : panel.vectors;
    const int64_t apart = G > 1 ? p_.op.H : p_.kernels.lanes();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < lines; ++i)
        __builtin_prefetch(at(row(token + r * p_.tokens.stride()), panel.unit + i * apart, p_.types.wide));
  }

 private:
  void normalise(int64_t first, int64_t last) const {
    parallel_for(last - first, rows_in(1 << 14, width_), [&](int64_t begin, int64_t end) {
      char* const x = row(first + begin);
      p_.kernels.norm.normalise(end - begin, width_, {.data = x, .dtype = p_.types.wide, .ld = ld_},
                                deviations_ ? at(x, 2 * width_, p_.types.wide) : nullptr);
    });
  }

  const RnnProblem<S>& p_;
  const int64_t width_;
  int64_t steps_, ld_, first_ = 0;
  void* data_ = nullptr;
  bool in_scratch_ = false, deviations_ = false;
  Buffer<S> scratch_;
};

}  // namespace llmkern::cpu::rnn
