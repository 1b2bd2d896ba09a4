// Recurrent layers, a few steps of few rows: decoding, and cells.
//
// Bytes: every weight once, G H (I + H) of them, from wherever they lie: 8 MB take 60 us from L3. Packing them would
// read and write them once more, so they are read in place, each row of W as one inner product with x or h, all in one
// parallel region per step, which threads share by units. With h and x in bf16, products are taken from pairs.
#include "core/rnn_loop.h"

namespace llmkern::cpu {
namespace rnn {
namespace {

constexpr int64_t kFewTokens = 16;           // that are not worth packing
constexpr int64_t kRows = 8;                 // that share a row of weights
constexpr int64_t kWorkPerThread = 1 << 17;  // multiply-adds that are worth a thread

template <class S>
class Steps {
 public:
  Steps(const Rnn& op, const RnnOutputs& out)
      : p_(op),
        out_(out),
        h_(op.B * op.H),
        c_(op.B * cells_of(op)),
        gx_(op.B * gates_of(op.mode) * op.H),
        bias_((gates_of(op.mode) + 1) * op.H),
        bytes_(op.B * op.H * itemsize(p_.types.operand)),
        operands_(2 * bytes_),
        wide_x_(widens() ? p_.tokens.total() * op.I * itemsize(p_.types.operand) : 0) {}

  void run() {
    const Rnn& op = p_.op;
    const auto& [wide, pairs, operand] = p_.types;
    const int64_t states = op.B * op.H, cells = op.B * cells_of(op);
    if (widens()) p_.kernels.copy(p_.tokens.total() * op.I, op.x, op.dtype, wide_x_.get(), operand);
    p_.kernels.copy(states, op.hx, op.state_dtype, h_.get(), wide);
    if (op.cx) p_.kernels.copy(cells, op.cx, op.state_dtype, c_.get(), wide);
    for (int64_t s : {0, 1}) p_.kernels.copy(states, h_.get(), wide, h_operand(s), operand);
    merge_biases(p_, bias_.get());
    for (int64_t s = 0; s < op.T; ++s) step(s);
    p_.kernels.copy(states, h_.get(), wide, out_.hy, op.state_dtype);
    if (op.cx) p_.kernels.copy(cells, c_.get(), wide, out_.cy, op.state_dtype);
  }

 private:
  bool widens() const { return p_.op.dtype != p_.types.operand; }
  // What step s multiplies. A double buffer: a step writes the other place.
  char* h_operand(int64_t s) const { return operands_.get() + s % 2 * bytes_; }
  const void* x() const { return widens() ? wide_x_.get() : p_.op.x; }

  void step(int64_t s) {
    const Rnn& op = p_.op;
    const int64_t t = p_.tokens.time(s), n = p_.tokens.rows(t), L = p_.kernels.lanes(), G = gates_of(op.mode);
    const int64_t width = G > 1 ? L : 4 * L, count = ceil_div(op.H, width);
    const int64_t macs = n * G * op.H * (op.I + op.H);
    const int64_t most = std::min<int64_t>(threads_of_region(), count);
    const int threads = static_cast<int>(std::clamp<int64_t>(macs / kWorkPerThread, 1, most));
    const auto units = [&](Range range) {
      for (int64_t u = range.begin * width; u < std::min(op.H, range.end * width); u += width)
        blocks(0, n, kRows, [&](int64_t b, int rows) { block(s, t, u, std::min(width, op.H - u), b, rows); });
    };
    if (threads == 1) return units({.begin = 0, .end = count});
#pragma omp parallel num_threads(threads)
    units(nth_range(count, omp_get_thread_num(), omp_get_num_threads()));
  }

  void block(int64_t s, int64_t t, int64_t u, int64_t units, int64_t b, int rows) const {
    alignas(64) S sums[kRows * 4 * 16];
    const Rnn& op = p_.op;
    const DType operand = p_.types.operand;
    const int64_t G = gates_of(op.mode), L = p_.kernels.lanes(), H = op.H, I = op.I, stride = p_.tokens.stride();
    const int64_t token = p_.tokens.first(t) + b * stride, vectors = G > 1 ? G : ceil_div(units, L);
    S* const gx = gx_.get() + b * G * H;
    const auto& products = p_.kernels.packing(p_.types.pairs);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = G > 1 ? v * H + u : u + v * L, lines = std::min(L, units - (G > 1 ? 0 : v * L));
      for (int64_t r = 0; r < rows; ++r) std::copy_n(bias_.get() + row, lines, gx + r * G * H + row);
      if (I > 0)
        products.dots(rows, lines, I, at(x(), token * I, operand), stride * I,
                      {.data = at(op.weight_ih, row * I, op.dtype), .dtype = op.dtype, .ld = I}, gx + row, G * H, true);
      products.dots(rows, lines, H, at(h_operand(s), b * H, operand), H,
                    {.data = at(op.weight_hh, row * H, op.dtype), .dtype = op.dtype, .ld = H}, sums + v * L,
                    vectors * L, false);
    }
    const RnnForwardArgs args{.op = &op,
                              .operand = operand,
                              .gx = gx,
                              .gx_ld = G * H,
                              .hidden_bias = bias_.get() + G * H,
                              .h = h_.get(),
                              .c = c_.get(),
                              .next = h_operand(s + 1),
                              .next_ld = H,
                              .y = out_.y,
                              .gates = out_.gates,
                              .cells = out_.cells};
    p_.kernels.rnn.forward(
        args, {.rows = rows, .b = b, .u = u, .units = units, .step = s, .token = token, .stride = stride}, sums);
  }

  const RnnProblem<S> p_;
  const RnnOutputs& out_;
  const Buffer<S> h_, c_, gx_, bias_;
  const int64_t bytes_;
  const Buffer<char> operands_, wide_x_;
};

}  // namespace

bool few_tokens(const Rnn& op) { return op.T == 1 || Tokens(op).total() <= kFewTokens; }
bool few_steps(const Rnn& op) { return op.heads == 1 && !op.weight_hr && !op.norms && few_tokens(op); }

void run_steps(const Rnn& op, const RnnOutputs& out) {
  op.dtype == DType::f64 ? Steps<double>(op, out).run() : Steps<float>(op, out).run();
}

}  // namespace rnn
}  // namespace llmkern::cpu
