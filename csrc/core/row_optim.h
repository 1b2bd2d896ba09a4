// Optimizer steps for the rows of a table that a batch looked up, with every other row as the dense optimizer would
// have it. See row_optim.cpp for the idea and the traffic.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"
#include "core/optim.h"
#include "core/row_order.h"

namespace llmkern::cpu {

enum class RowOptim : int { adam, sgd, adagrad };

// What holds for all steps on record. `closed`: what gradientless steps do to a row is computed at once, to the
// rounding of fp32; else step by step, to the bits of the dense optimizer. fp32 alone; not with Adam's L2 penalty, nor
// Adagrad.
struct RowRule {
  RowOptim kind;
  bool decoupled, maximize, nesterov, closed;
};

// The numbers of one step, which counts from 1. `first` and `second`: Adam's betas; Sgd's momentum and dampening;
// Adagrad's lr_decay and nothing.
struct RowStep {
  double step, lr, first, second, eps, weight_decay;
};

// One step, and what it and all later ones do to a row that gets no gradient from then on. doubles, so that it can
// lie in a tensor.
struct RowRecord {
  RowStep step;
  alignas(double) unsigned char rule[9 * sizeof(double)];  // see isa/optim_rules.h
  // Closed form. Adam: p = keep[0] p - m (weight[0] / (r + eps[0]) + weight[1] / (r + eps[1])), where r is the root of
  // v; m = keep[1] m, v = keep[2] v. Elements with r < least go step by step. Sgd, with its buffer b:
  // p = keep[0] p + keep[1] b, b = keep[2] p + keep[3] b.
  double keep[4], weight[2], eps[2], least;
  // What Adam's weights are made of: sums over the steps of w (y - origin)^k; see row_optim.cpp.
  double moments[5], origin, complete;
};
static_assert(sizeof(RowRecord) % sizeof(double) == 0);
inline constexpr int64_t kRowRecordSize = sizeof(RowRecord) / sizeof(double);

// A table (V, D) with its states, as in OptimTensor, and the `count` steps on record; the first applied[r] of them have
// been made on row r.
struct RowTable {
  void* param;
  void* states[3];
  DType dtype, state_dtype;
  int64_t V, D;
  int32_t* applied;
  RowRecord* history;
  int64_t count;
  RowRule rule;
};

// out (N, D): rows as they are after all steps on record; nothing else is written. Closed rules only.
void row_lookup(const RowTable& table, Indices indices, int64_t N, void* out);

// Makes the steps on record on the rows of a batch, or on all.
void row_catch_up(const RowTable& table, const RowOrder& batch);
void row_catch_up(const RowTable& table);

// One step whose gradient is the sum, row by row, of values (N, D) of the table's dtype, times grad_scale. Whether the
// step changes rows without a gradient; if so it stands on record as history[count].
bool row_step(const RowTable& table, const RowStep& step, double grad_scale, const RowOrder& batch, const void* values);

// On a row of which `applied` steps have been made. Row `next` is fetched meanwhile.
struct RowOptimKernels {
  void (*lookup)(const RowTable& table, int64_t row, int64_t applied, int64_t next, bool stream, void* out);
  void (*catch_up)(const RowTable& table, int64_t row, int64_t applied, int64_t next);
  // Columns [begin, end); the gradient is the sum of rows order[0..n) of values, of which row `later` is fetched.
  // `rule` as made by make_rule.
  void (*step)(const RowTable& table, const unsigned char* rule, int64_t row, int64_t applied, int64_t next,
               const void* values, const uint32_t* order, int64_t n, int64_t later, int64_t begin, int64_t end);
  void (*make_rule)(const RowTable& table, const RowStep& step, double grad_scale, unsigned char* rule);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(RowOptimKernels, row_optim)
