// Optimizer steps on the rows of a table that have a gradient. See sparse_optim.cpp.
#pragma once
#include "core/indices.h"
#include "core/optim.h"

namespace llmkern::cpu {

// Row indices[i] of a table of V rows has the gradient values[i]; a row that comes several times has their sum.
struct RowGradient {
  Indices indices;     // (N)
  const void* values;  // (N, D)
  int64_t N, V, D;
  DType dtype;
};

// Adagrad with one accumulator for each row: the sum of mean squares.
struct RowWiseAdagrad {
  double lr, eps;
  bool maximize;
  double grad_scale = 1;
};

// The states of SparseAdam: exp_avg, exp_avg_sq (V, D). Adagrad: sum (V, D). RowWiseAdagrad: sum (V), in the dtype that
// arithmetic is done in.
struct OptimTable {
  void* param;  // (V, D), of the gradient's dtype
  void* states[2];
  DType state_dtype;
  double step;
};

// Throw std::out_of_range, before anything is written, if an index is outside [0, V).
void sparse_step(const Sgd& op, const RowGradient& grad, const OptimTable& table);  // without momentum
void sparse_step(const Adagrad& op, const RowGradient& grad, const OptimTable& table);
void sparse_step(const SparseAdam& op, const RowGradient& grad, const OptimTable& table);
void sparse_step(const RowWiseAdagrad& op, const RowGradient& grad, const OptimTable& table);
// Of the whole gradient, rows added up.
double sparse_sum_of_squares(const RowGradient& grad);

// Steps row `row`, whose gradient is `sum` (D), in the dtype that arithmetic is done in; fetches row `next`.
template <class Op>
using RowKernel = void (*)(const Op& op, const RowGradient& grad, const OptimTable& table, int64_t row, int64_t next,
                           const void* sum);

struct SparseOptimKernels {
  // sum (D) = the values at `count` positions, added up in their order; fetches those at position `next`.
  void (*sum)(const RowGradient& grad, const uint32_t* positions, int64_t count, int64_t next, void* sum);
  RowKernel<Sgd> sgd;
  RowKernel<Adagrad> adagrad;
  RowKernel<SparseAdam> sparse_adam;
  RowKernel<RowWiseAdagrad> rowwise_adagrad;
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(SparseOptimKernels, sparse_optim)
