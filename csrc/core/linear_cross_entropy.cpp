// Linear layer and cross-entropy as one: the N*V logits are never there as a whole.
//
// FLOPs: 2NHV for the logits, as much again for each of dx and dlinear_weight; rows that are ignored cost nothing. They
// are taken in chunks of as many rows as the workspace holds:
//
//   for chunks of rows that count                       (gathered, if some do not)
//     logits = x W^T + b              (R, V), fp32      a product
//     losses, and dlogits in place    (R, V)            core/cross_entropy.cpp; bf16 operands get bf16 dlogits
//     dx = dlogits W                  (R, H)            a product
//     dW += dlogits^T x               (V, H)            a product; db += the sums of dlogits' columns
//
// Traffic: a chunk's logits are written once and read three times, which is small beside 6RHV FLOPs unless H is; so a
// chunk need not fit a cache, but W is read twice and dW read and written for every chunk: the larger the better. dW is
// summed in fp32, in scratch of its own (V, H) if there are several chunks and it is narrower.
#include "core/linear_cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/gemm.h"
#include "core/linear.h"
#include "core/memory.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

const char* at(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; }
char* at(void* p, int64_t bytes) { return p ? static_cast<char*>(p) + bytes : nullptr; }

// Rows of one chunk, side by side: where they lie if none between them is ignored, else gathered.
class Gather {
 public:
  Gather(const void* from, const std::vector<int64_t>& rows, int64_t begin, int64_t end, int64_t bytes)
      : copy_(from && rows[end - 1] - rows[begin] != end - 1 - begin ? (end - begin) * bytes : 0),
        data_(at(from, rows[begin] * bytes)) {
    if (copy_.size() == 0) return;
    for (int64_t r = begin; r < end; ++r) std::memcpy(&copy_[(r - begin) * bytes], at(from, rows[r] * bytes), bytes);
    data_ = copy_.data();
  }
  const void* get() const { return data_; }

 private:
  std::vector<char> copy_;
  const char* data_;
};

// The loss chunk by chunk, with the scratch that chunks share.
class ChunkedLoss {
 public:
  ChunkedLoss(const LinearCrossEntropy& op, const CrossEntropyOutputs& outputs,
              const CrossEntropyCotangents& cotangents, const LinearCrossEntropyGradients& gradients)
      : op_(op),
        outputs_(outputs),
        cotangents_(cotangents),
        gradients_(gradients),
        rows_(counting_rows(op.loss)),
        chunks_(ceil_div(count(), rows_in(op.workspace, op.loss.V * itemsize(op.loss.dtype)))),
        sums_in_scratch_(gradients.dlinear_weight && chunks_ > 1 && op.dtype != op.loss.dtype),
        bias_(op.linear_bias, op.dtype, op.loss.V),
        logits_((chunks_ ? ceil_div(count(), chunks_) : 0) * op.loss.V * itemsize(op.loss.dtype)),
        dweight_(sums_in_scratch_ ? op.loss.V * op.H * itemsize(op.loss.dtype) : 0),
        dbias_(gradients.dlinear_bias ? op.loss.V * itemsize(op.loss.dtype) : 0) {}

  void run() {
    const int64_t V = op_.loss.V, N = count();
    skip_ignored();
    for (int64_t c = 0; c < chunks_; ++c) chunk(N * c / chunks_, N * (c + 1) / chunks_, c > 0);
    if (chunks_ == 0) return nothing();
    if (sums_in_scratch_) convert(dweight_.get(), V * op_.H, gradients_.dlinear_weight, op_.dtype);
    if (gradients_.dlinear_bias) convert(dbias_.get(), V, gradients_.dlinear_bias, op_.dtype);
  }

 private:
  static std::vector<int64_t> counting_rows(const CrossEntropy& loss) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < loss.N; ++i)
      if (!loss.target || loss.target[i] != loss.ignore_index) rows.push_back(i);
    return rows;
  }
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }

  void skip_ignored() const {
    if (count() == op_.loss.N) return;
    for (void* p : {outputs_.loss, outputs_.lse, outputs_.entropy})
      if (p) std::memset(p, 0, op_.loss.N * itemsize(op_.loss.dtype));
    if (outputs_.argmax) std::fill_n(outputs_.argmax, op_.loss.N, -1);
    if (gradients_.dx) std::memset(gradients_.dx, 0, op_.loss.N * op_.H * itemsize(op_.dtype));
  }

  void nothing() const {
    const int64_t bytes = op_.loss.V * itemsize(op_.dtype);
    if (gradients_.dlinear_weight) std::memset(gradients_.dlinear_weight, 0, bytes * op_.H);
    if (gradients_.dlinear_bias) std::memset(gradients_.dlinear_bias, 0, bytes);
  }

  // Rows [begin, end) of those that count.
  void chunk(int64_t begin, int64_t end, bool accumulate) const {
    const int64_t R = end - begin, V = op_.loss.V, H = op_.H;
    const DType wide = op_.loss.dtype;
    const Gather rows(op_.x, rows_, begin, end, H * itemsize(op_.dtype));
    const Matrix x{.data = rows.get(), .dtype = op_.dtype, .ld = H};
    const Matrix weight{.data = op_.linear_weight, .dtype = op_.dtype, .ld = H};
    gemm(R, V, H, x, transposed(weight), {.data = logits_.get(), .dtype = wide, .ld = V}, false, bias_.get());
    losses(begin, end);
    const Matrix dlogits{.data = logits_.get(), .dtype = grad_dtype_, .ld = V * itemsize(wide) / itemsize(grad_dtype_)};
    if (gradients_.dx) {
      const int64_t bytes = H * itemsize(op_.dtype);
      const Buffer<char> apart(scattered(begin, end) ? R * bytes : 0);
      void* const dx = scattered(begin, end) ? apart.get() : at(gradients_.dx, rows_[begin] * bytes);
      gemm(R, H, V, dlogits, weight, {.data = dx, .dtype = op_.dtype, .ld = H}, false);
      if (scattered(begin, end)) scatter(apart.get(), gradients_.dx, begin, end, bytes);
    }
    if (gradients_.dlinear_weight) gemm(V, H, R, transposed(dlogits), x, dweight(), accumulate);
    if (gradients_.dlinear_bias) sum_rows(dlogits, R, accumulate);
  }
  static Matrix transposed(Matrix x) {
    x.transposed = !x.transposed;
    return x;
  }
  MutableView dweight() const {
    if (sums_in_scratch_) return {.data = dweight_.get(), .dtype = op_.loss.dtype, .ld = op_.H};
    return {.data = gradients_.dlinear_weight, .dtype = op_.dtype, .ld = op_.H};
  }

  void losses(int64_t begin, int64_t end) const {
    const int64_t R = end - begin, accum = itemsize(op_.loss.dtype);
    const bool apart = scattered(begin, end);
    const auto gather = [&](const void* from, int64_t bytes) { return Gather(from, rows_, begin, end, bytes); };
    const Gather target = gather(op_.loss.target, 8), dloss = gather(cotangents_.loss, accum),
                 dlse = gather(cotangents_.lse, accum), dentropy = gather(cotangents_.entropy, accum);
    const Buffer<char> results(apart ? R * (8 + 3 * accum) : 0);
    const auto place = [&](void* p, int64_t offset, int64_t bytes) -> void* {
      return apart && p ? results.get() + R * offset : at(p, rows_[begin] * bytes);
    };
    const CrossEntropyOutputs outputs{.loss = place(outputs_.loss, 8, accum),
                                      .lse = place(outputs_.lse, 8 + accum, accum),
                                      .entropy = place(outputs_.entropy, 8 + 2 * accum, accum),
                                      .argmax = static_cast<int64_t*>(place(outputs_.argmax, 0, 8))};
    CrossEntropy loss = op_.loss;
    // Probabilities ignore no row: theirs are never gathered.
    const int64_t of_target = begin * loss.V * itemsize(loss.target_dtype);
    loss.N = R;
    loss.target = static_cast<const int64_t*>(target.get());
    loss.probabilities = at(loss.probabilities, of_target);
    const bool any = gradients_.dx || gradients_.dlinear_weight || gradients_.dlinear_bias;
    cross_entropy(
        loss, logits_.get(), outputs, {.loss = dloss.get(), .lse = dlse.get(), .entropy = dentropy.get()},
        {.dlogits = any ? logits_.get() : nullptr, .dtype = grad_dtype_, .dtarget = at(gradients_.dtarget, of_target)});
    if (!apart) return;
    scatter(outputs.loss, outputs_.loss, begin, end, accum);
    scatter(outputs.lse, outputs_.lse, begin, end, accum);
    scatter(outputs.entropy, outputs_.entropy, begin, end, accum);
    scatter(outputs.argmax, outputs_.argmax, begin, end, 8);
  }

  void sum_rows(const Matrix& dlogits, int64_t R, bool accumulate) const {
    visit(op_.loss.dtype, [&](auto t) {
      const std::vector<Accum<decltype(t)>> ones(R, 1);
      gemm(1, op_.loss.V, R, {.data = ones.data(), .dtype = op_.loss.dtype, .ld = R}, dlogits,
           {.data = dbias_.get(), .dtype = op_.loss.dtype, .ld = op_.loss.V}, accumulate);
    });
  }

  bool scattered(int64_t begin, int64_t end) const { return rows_[end - 1] - rows_[begin] != end - 1 - begin; }
  void scatter(const void* from, void* to, int64_t begin, int64_t end, int64_t bytes) const {
    for (int64_t r = begin; to && r < end; ++r)
      std::memcpy(at(to, rows_[r] * bytes), at(from, (r - begin) * bytes), bytes);
  }

  const LinearCrossEntropy& op_;
  const CrossEntropyOutputs& outputs_;
  const CrossEntropyCotangents& cotangents_;
  const LinearCrossEntropyGradients& gradients_;
  // Where products of bf16 are faster, dlogits are rounded to it, as torch's are; else they stay where the logits were.
  const DType grad_dtype_ = op_.dtype == DType::bf16 && gemm_multiplies_bf16() ? DType::bf16 : op_.loss.dtype;
  const std::vector<int64_t> rows_;  // those that count
  const int64_t chunks_;
  const bool sums_in_scratch_;  // of dweight
  const WideBias bias_;
  const Buffer<char> logits_, dweight_, dbias_;
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& op, const CrossEntropyOutputs& outputs,
                          const CrossEntropyCotangents& cotangents, const LinearCrossEntropyGradients& gradients) {
  check_targets(op.loss);
  ChunkedLoss(op, outputs, cotangents, gradients).run();
}

}  // namespace llmkern::cpu
