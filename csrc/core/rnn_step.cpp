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
  Steps(const Rnn& op, void* y, void* gates, void* cells) : op_(op), y_(y), gates_(gates), cells_(cells) {}

  void run(void* hy, void* cy) {
    const int64_t B = op_.B, H = op_.H, C = cells_of(op_), G = gates_of(op_.mode), n = tokens_.total();
    const bool widens = op_.dtype != operand_;
    const Buffer<S> h(B * H), c(B * C), gx(B * G * H), bias(G * H + H);
    const Buffer<char> operands(2 * B * H * itemsize(operand_)), x(widens ? n * op_.I * itemsize(operand_) : 0);
    h_ = h.get();
    c_ = c.get();
    gx_ = gx.get();
    bias_ = bias.get();
    operands_[0] = operands.get();
    operands_[1] = at(operands.get(), B * H, operand_);
    x_ = widens ? x.get() : op_.x;
    if (widens) kernels_.copy(n * op_.I, op_.x, op_.dtype, x.get(), operand_);
    kernels_.copy(B * H, op_.hx, op_.state_dtype, h_, wide_);
    if (op_.cx) kernels_.copy(B * C, op_.cx, op_.state_dtype, c_, wide_);
    for (void* operand : operands_) kernels_.copy(B * H, h_, wide_, operand, operand_);
    merge_biases(op_, kernels_, bias_);
    for (int64_t s = 0; s < op_.T; ++s) step(s);
    kernels_.copy(B * H, h_, wide_, hy, op_.state_dtype);
    if (op_.cx) kernels_.copy(B * C, c_, wide_, cy, op_.state_dtype);
  }

 private:
  void step(int64_t s) {
    const int64_t t = tokens_.time(s), n = tokens_.rows(t), L = kernels_.lanes(), G = gates_of(op_.mode);
    const int64_t width = G > 1 ? L : 4 * L, count = ceil_div(op_.H, width);
    const int64_t macs = n * G * op_.H * (op_.I + op_.H);
    const int64_t most = std::min<int64_t>(threads_of_region(), count);
    const int threads = static_cast<int>(std::clamp<int64_t>(macs / kWorkPerThread, 1, most));
    const auto units = [&](Range range) {
      for (int64_t u = range.begin * width; u < std::min(op_.H, range.end * width); u += width)
        blocks(0, n, kRows, [&](int64_t b, int rows) { block(s, t, u, std::min(width, op_.H - u), b, rows); });
    };
    if (threads == 1) return units({0, count});
#pragma omp parallel num_threads(threads)
    units(part(count, omp_get_thread_num(), omp_get_num_threads()));
  }

  void block(int64_t s, int64_t t, int64_t u, int64_t units, int64_t b, int rows) const {
    alignas(64) S sums[kRows * 4 * 16];
    const int64_t G = gates_of(op_.mode), L = kernels_.lanes(), H = op_.H, I = op_.I, stride = tokens_.stride();
    const int64_t token = tokens_.first(t) + b * stride, vectors = G > 1 ? G : ceil_div(units, L);
    S* const gx = gx_ + b * G * H;
    const auto& products = kernels_.packing(pairs_);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = G > 1 ? v * H + u : u + v * L, lines = std::min(L, units - (G > 1 ? 0 : v * L));
      for (int64_t r = 0; r < rows; ++r) std::copy_n(bias_ + row, lines, gx + r * G * H + row);
      if (I > 0)
        products.dots(rows, lines, I, at(x_, token * I, operand_), stride * I, at(op_.weight_ih, row * I, op_.dtype),
                      op_.dtype, I, gx + row, G * H, true);
      products.dots(rows, lines, H, at(operands_[s % 2], b * H, operand_), H, at(op_.weight_hh, row * H, op_.dtype),
                    op_.dtype, H, sums + v * L, vectors * L, false);
    }
    const RnnForwardArgs args{&op_, operand_, gx,     G * H, bias_ + G * H, h_, c_, operands_[(s + 1) % 2],
                              H,    y_,       gates_, cells_};
    kernels_.rnn.forward(args, {rows, b, u, units, s, token, stride}, sums);
  }

  const Rnn& op_;
  const DType wide_ = accum_of(op_.dtype);
  const Kernels<S> kernels_{};
  const Tokens tokens_{op_};
  const bool pairs_ = op_.dtype == DType::bf16 && gemm_multiplies_bf16();
  const DType operand_ = pairs_ ? DType::bf16 : wide_;
  void *y_, *gates_, *cells_;
  S *h_ = nullptr, *c_ = nullptr, *gx_ = nullptr, *bias_ = nullptr;
  void* operands_[2];
  const void* x_ = nullptr;
};

}  // namespace

bool few_tokens(const Rnn& op) { return op.T == 1 || Tokens(op).total() <= kFewTokens; }
bool few_steps(const Rnn& op) { return op.heads == 1 && !op.weight_hr && !op.norms && few_tokens(op); }

void run_steps(const Rnn& op, void* y, void* hy, void* cy, void* gates, void* cells) {
  if (op.dtype == DType::f64)
    Steps<double>(op, y, gates, cells).run(hy, cy);
  else
    Steps<float>(op, y, gates, cells).run(hy, cy);
}

}  // namespace rnn
}  // namespace llmkern::cpu
