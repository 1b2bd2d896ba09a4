// Optimizer steps on the rows that have a gradient.
//
// The positions are sorted by row (row_order.h). A thread takes whole runs of equal rows: it adds up the run's
// gradients in a row of scratch, in the order of the batch, and steps the row while the sum is in the L1 cache. So each
// gradient, parameter and state that takes part is read once and written once, and nothing depends on the number of
// threads. Traffic of row-wise Adagrad in fp32: 12 bytes for each element of a gradient.
#include "core/sparse_optim.h"

#include <algorithm>
#include <vector>

#include "core/grad_norm.h"
#include "core/row_order.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

DType accum_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// f(run, row, row of the next run, sum) for every row that has a gradient.
template <class F>
void each_row(const RowGradient& grad, const RowOrder& sorted, const F& f) {
  const auto sum_rows = LLMKERN_SELECT(sparse_optim).sum;
  const uint32_t *starts = sorted.starts(), *rows = sorted.rows();
  const int64_t grain = std::max<int64_t>(1, 32 * 1024 / std::max<int64_t>(1, grad.D));
  parallel_for(grad.N, grain, [&](int64_t begin, int64_t end) {
    const Buffer<char> sum(grad.D * itemsize(accum_of(grad.dtype)));
    int64_t r = std::lower_bound(starts, starts + sorted.runs(), static_cast<uint32_t>(begin)) - starts;
    for (; r < sorted.runs() && starts[r] < end; ++r) {
      const int64_t next = r + 1 < sorted.runs() ? r + 1 : r;
      sum_rows(grad, sorted.order() + starts[r], starts[r + 1] - starts[r], sorted.order()[starts[next]], sum.get());
      f(r, rows[r], rows[next], sum.get());
    }
  });
}

template <class Op>
void step(RowKernel<Op> kernel, const Op& op, const RowGradient& grad, const Table& table) {
  const RowOrder sorted(grad.indices, grad.N, grad.V);
  each_row(grad, sorted,
           [&](int64_t, int64_t row, int64_t next, const void* sum) { kernel(op, grad, table, row, next, sum); });
}

}  // namespace

void sparse_step(const Sgd& op, const RowGradient& grad, const Table& table) {
  step(LLMKERN_SELECT(sparse_optim).sgd, op, grad, table);
}

void sparse_step(const Adagrad& op, const RowGradient& grad, const Table& table) {
  step(LLMKERN_SELECT(sparse_optim).adagrad, op, grad, table);
}

void sparse_step(const SparseAdam& op, const RowGradient& grad, const Table& table) {
  step(LLMKERN_SELECT(sparse_optim).sparse_adam, op, grad, table);
}

void sparse_step(const RowWiseAdagrad& op, const RowGradient& grad, const Table& table) {
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
