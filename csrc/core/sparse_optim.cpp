// Optimizer steps on the rows that have a gradient.
//
// The positions are sorted by row (row_order.h). A thread takes whole runs of equal rows: it adds up the run's
// gradients in a row of scratch, in an order that the run decides, and steps the row while the sum is in the L1 cache.
// So each gradient, parameter and state that takes part is read once and written once, and nothing depends on the
// number of threads. Traffic of row-wise Adagrad in fp32: 12 bytes for each element of a gradient.
#include "core/sparse_optim.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/grad_norm.h"
#include "core/row_order.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

// The sums of runs. A run of many positions is split into chunks, which all threads add up first; where depends on the
// run alone.
class RowGradientSums {
 public:
  RowGradientSums(const RowGradient& grad, const RowOrder& sorted)
      : grad_(grad),
        sorted_(sorted),
        row_bytes_(grad.D * itemsize(accum_of(grad.dtype))),
        chunks_(find() * row_bytes_) {
    parallel_for(begins_.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const uint32_t* const positions = sorted_.order() + begins_[i];
        kernel_(grad_, positions, std::min<int64_t>(kChunk, ends_[i] - begins_[i]), *positions, chunk(i));
      }
    });
  }

  // sum (D) of run r; fetches what run `later` begins with.
  void of(int64_t r, int64_t later, void* sum) const {
    const uint32_t* const starts = sorted_.starts();
    const int64_t count = starts[r + 1] - starts[r];
    if (count <= kChunk) return kernel_(grad_, sorted_.order() + starts[r], count, sorted_.order()[starts[later]], sum);
    const int64_t first = std::lower_bound(begins_.begin(), begins_.end(), starts[r]) - begins_.begin();
    const int64_t n = ceil_div(count, kChunk);
    std::vector<uint32_t> all(n);
    std::iota(all.begin(), all.end(), 0u);
    kernel_({.indices = {}, .values = chunk(first), .N = n, .V = n, .D = grad_.D, .dtype = accum_of(grad_.dtype)},
            all.data(), n, 0, sum);
  }

  int64_t row_bytes() const { return row_bytes_; }

 private:
  static constexpr int64_t kChunk = 128;

  // Fills begins_ and ends_: chunk i begins at begins_[i], its run ends at ends_[i].
  int64_t find() {
    const uint32_t* const starts = sorted_.starts();
    for (int64_t r = 0; r < sorted_.runs(); ++r)
      if (starts[r + 1] - starts[r] > kChunk)
        for (int64_t i = starts[r]; i < starts[r + 1]; i += kChunk) {
          begins_.push_back(i);
          ends_.push_back(starts[r + 1]);
        }
    return begins_.size();
  }
  char* chunk(int64_t i) const { return chunks_.get() + i * row_bytes_; }

  const RowGradient& grad_;
  const RowOrder& sorted_;
  const int64_t row_bytes_;
  std::vector<uint32_t> begins_, ends_;
  const Buffer<char> chunks_;
  decltype(SparseOptimKernels::sum) const kernel_ = LLMKERN_SELECT(sparse_optim).sum;
};

// The runs, by where they first come in the batch: gradients then are read as they lie in memory.
std::vector<uint32_t> by_position(const RowOrder& sorted) {
  constexpr uint32_t kNone = UINT32_MAX;
  std::vector<uint32_t> runs(sorted.positions(), kNone);
  for (int64_t r = 0; r < sorted.runs(); ++r) runs[sorted.order()[sorted.starts()[r]]] = static_cast<uint32_t>(r);
  std::erase(runs, kNone);
  return runs;
}

// f(run, row, row of a later run, sum) for every row that has a gradient.
template <class F>
void each_row(const RowGradient& grad, const RowOrder& sorted, const F& f) {
  const RowGradientSums sums(grad, sorted);
  const std::vector<uint32_t> runs = by_position(sorted);
  const int64_t grain = rows_in(32 * 1024, grad.D);
  // What is fetched while a row is at work: 16 KiB ahead.
  const int64_t ahead = 1 + (16 << 10) / (sums.row_bytes() + 1), last = static_cast<int64_t>(runs.size()) - 1;
  parallel_for(runs.size(), grain, [&](int64_t begin, int64_t end) {
    const Buffer<char> sum(sums.row_bytes());
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t run = runs[i], later = runs[std::min(i + ahead, last)];
      sums.of(run, later, sum.get());
      f(run, sorted.rows()[run], sorted.rows()[later], sum.get());
    }
  });
}

template <class Op>
void step(RowKernel<Op> kernel, const Op& op, const RowGradient& grad, const OptimTable& table) {
  const RowOrder sorted(grad.indices, grad.N, grad.V);
  each_row(grad, sorted,
           [&](int64_t, int64_t row, int64_t next, const void* sum) { kernel(op, grad, table, row, next, sum); });
}

}  // namespace

void sparse_step(const Sgd& op, const RowGradient& grad, const OptimTable& table) {
  step(LLMKERN_SELECT(sparse_optim).sgd, op, grad, table);
}

void sparse_step(const Adagrad& op, const RowGradient& grad, const OptimTable& table) {
  step(LLMKERN_SELECT(sparse_optim).adagrad, op, grad, table);
}

void sparse_step(const SparseAdam& op, const RowGradient& grad, const OptimTable& table) {
  step(LLMKERN_SELECT(sparse_optim).sparse_adam, op, grad, table);
}

void sparse_step(const RowWiseAdagrad& op, const RowGradient& grad, const OptimTable& table) {
  step(LLMKERN_SELECT(sparse_optim).rowwise_adagrad, op, grad, table);
}

double sparse_sum_of_squares(const RowGradient& grad) {
  const RowOrder sorted(grad.indices, grad.N, grad.V);
  const auto squares = LLMKERN_SELECT(grad_norm).sum_of_squares;
  std::vector<double> sums(sorted.runs());
  each_row(grad, sorted, [&](int64_t run, int64_t, int64_t, const void* sum) {
    sums[run] = squares(sum, grad.D, accum_of(grad.dtype));
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace llmkern::cpu
