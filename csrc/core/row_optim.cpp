// Exact optimizers at the cost of a batch.
//
// An elementwise optimizer does to an element without a gradient what follows from the element and from the numbers of
// the step. So rows that no batch looks up can wait: the steps' numbers are put on record, each row knows how many of
// them it has had, and it is brought up to date when it is next looked up, or when somebody reads the whole table.
//
// Step by step, that costs the arithmetic of the dense optimizer; the closed form costs one pass. For Adam, from a
// start with m and v, over steps u,
//
//   p = keep p - m sum_u w_u / (sqrt(v) + eps y_u),  y_u = sqrt((1 - beta2^u) / beta2^(steps since)),
//                                                    w_u = lr / (1 - beta1^u) beta1^(steps since) y_u (decays after u)
//
// y moves little while w lasts, so the sum is a Gaussian quadrature of two nodes with the same five moments (the fifth
// bounds the error): exact for one and two steps, and for others to 2^-23 of the change where sqrt(v) >= `least`. With
// amsgrad, the root is that of the maximum, which does not decay. Sgd is linear in p and its buffer: a 2 x 2 product.
//
// Traffic of a training step with R rows of D in fp32: a lookup reads p, m, v of a row (nothing but p if it is up to
// date) and writes N D; the step reads N D of gradients and reads and writes p, m, v. Nothing depends on V.
#include "core/row_optim.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr double kTolerance = 0x1p-23, kGone = 0x1p-50, kLongWay = 1000, kLargest = 1e15, kSmallest = 1e-18;
constexpr int64_t kGrain = 32 * 1024;  // elements that are worth a thread
constexpr int64_t kLongRun = 64;       // positions; a longer run is split by columns
constexpr int64_t kColumns = 64;

// How many rows ahead of its turn a row is fetched: a few KB of each array.
int64_t rows_ahead(const RowTable& table) {
  constexpr int64_t kBytes = 12 * 1024;
  return 1 + kBytes / (1 + table.D * itemsize(table.dtype));
}

bool changes_idle_rows(RowOptim kind, const RowStep& step) {
  return kind == RowOptim::adam || step.weight_decay != 0 || (kind == RowOptim::sgd && step.first != 0);
}

// The two nodes and weights that have the moments of `r`, and where they are good enough.
void solve(RowRecord& r) {
  const double total = r.moments[0];
  r.weight[0] = total;
  r.weight[1] = r.least = 0;
  r.eps[0] = r.eps[1] = r.step.eps * r.origin;
  if (!(total > 0)) return;
  // About the mean.
  const double mean = r.moments[1] / total, m2 = r.moments[2] / total, m3 = r.moments[3] / total;
  const double variance = m2 - mean * mean, third = m3 - 3 * mean * m2 + 2 * mean * mean * mean;
  const double fourth = r.moments[4] / total - 4 * mean * m3 + 6 * mean * mean * m2 - 3 * mean * mean * mean * mean;
  const double y = r.origin + mean;
  r.eps[0] = r.eps[1] = r.step.eps * y;
  // How far y has come: beyond, its moments say nothing of where it began.
  const double way = y / r.origin;
  if (!(way < kLongWay)) r.least = std::numeric_limits<double>::infinity();
  if (!(variance > 1e-12 * y * y)) return;
  const double half = third / variance / 2, root = std::sqrt(half * half + variance);
  const double low = half - root, high = half + root;
  r.weight[0] = total * high / (high - low);
  r.weight[1] = total * -low / (high - low);
  r.eps[0] = r.step.eps * (y + low);
  r.eps[1] = r.step.eps * (y + high);
  // The remainder of the quadrature of 1 / (1 + x y), relative to it: at most `rest` (x y / (1 + x y))^4.
  const double rest = (fourth - variance * variance - third * third / variance) / std::pow(y, 4) * std::pow(way, 5);
  if (rest <= kTolerance || !(way < kLongWay)) return;
  const double ratio = std::pow(kTolerance / rest, 0.25);
  r.least = r.step.eps * y * (1 - ratio) / ratio;
}

// Step `u` follows on what is on record in `r`.
void extend_adam(RowRecord& r, const RowStep& u, const RowRule& rule, bool amsgrad) {
  const double shrink = rule.decoupled ? 1 - u.lr * u.weight_decay : 1;
  r.keep[0] *= shrink;
  r.keep[1] *= u.first;
  r.keep[2] *= u.second;
  for (double& moment : r.moments) moment *= shrink;
  if (r.complete != 0) {
    for (double& weight : r.weight) weight *= shrink;
    return;
  }
  const double y = std::sqrt((1 - std::pow(u.second, u.step)) / (amsgrad ? 1 : r.keep[2]));
  if (r.origin == 0) r.origin = y;
  double w = u.lr / (1 - std::pow(u.first, u.step)) * r.keep[1] * y;
  for (double& moment : r.moments) {
    moment += w;
    w *= y - r.origin;
  }
  // Later steps add nothing that fp32 would see.
  if (r.keep[1] * y < kGone * r.origin) r.complete = 1;
  solve(r);
  if (u.eps == 0) r.least = std::max(r.least, kSmallest);
  if (r.weight[0] + r.weight[1] + r.eps[1] + y < kLargest && (u.eps == 0 || r.eps[0] > kSmallest)) return;
  // Products would leave fp32's range, as with beta2 = 0: whatever moves goes step by step.
  r.complete = 1;
  r.weight[0] = r.weight[1] = 0;
  r.eps[0] = r.eps[1] = 1;
  r.least = std::numeric_limits<double>::infinity();
}

void extend_sgd(RowRecord& r, const RowStep& u, const RowRule& rule) {
  // p, b -> (1 - p_of_p) p - p_of_b b, b_of_p p + b_of_b b.
  const bool begins = u.step == 1;
  const double b_of_b = begins ? 0 : u.first, b_of_p = (begins ? 1 : 1 - u.second) * u.weight_decay;
  const double buffered = u.first != 0;
  double along_p = u.weight_decay, along_b = 0;
  if (buffered) {
    along_p = rule.nesterov ? u.weight_decay + u.first * b_of_p : b_of_p;
    along_b = rule.nesterov ? u.first * b_of_b : b_of_b;
  }
  const double pp = r.keep[0], pb = r.keep[1], bp = r.keep[2], bb = r.keep[3];
  r.keep[0] = (1 - u.lr * along_p) * pp - u.lr * along_b * bp;
  r.keep[1] = (1 - u.lr * along_p) * pb - u.lr * along_b * bb;
  if (buffered) {
    r.keep[2] = b_of_p * pp + b_of_b * bp;
    r.keep[3] = b_of_p * pb + b_of_b * bb;
  }
}

void append(const RowTable& table, const RowStep& step) {
  RowRecord& last = table.history[table.count];
  std::memset(&last, 0, sizeof last);
  last.step = step;
  LLMKERN_SELECT(row_optim).make_rule(table, step, 1, last.rule);
  if (!table.rule.closed) return;
  const bool adam = table.rule.kind == RowOptim::adam;
  last.keep[0] = 1;
  last.keep[1] = last.keep[2] = adam;
  last.keep[3] = 1;
  for (int64_t i = 0; i <= table.count; ++i)
    if (adam)
      extend_adam(table.history[i], step, table.rule, table.states[2]);
    else
      extend_sgd(table.history[i], step, table.rule);
}

// A part of a step: columns [begin, end) of a run. Cost in rows.
struct ColumnBlock {
  int64_t run, begin, end, cost_before;
};

// Long runs are split by columns, so that a row that half of a batch looks up is not one thread's alone.
std::vector<ColumnBlock> blocks_of(const RowTable& table, const RowOrder& batch, int64_t* total) {
  constexpr int64_t kUpdate = 6;  // what reads and writes of p, m and v cost, in reads of a gradient
  std::vector<ColumnBlock> blocks;
  blocks.reserve(batch.runs());
  *total = 0;
  for (int64_t r = 0; r < batch.runs(); ++r) {
    const int64_t n = batch.starts()[r + 1] - batch.starts()[r], D = table.D;
    const int64_t parts = n <= kLongRun ? 1 : std::clamp<int64_t>(D / kColumns, 1, n / kLongRun + 1);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = D * part / parts / kColumns * kColumns;
      const int64_t end = part + 1 == parts ? D : D * (part + 1) / parts / kColumns * kColumns;
      blocks.push_back({.run = r, .begin = begin, .end = end, .cost_before = *total});
      *total += (n + kUpdate) * (end - begin) / std::max<int64_t>(1, D) + 1;
    }
  }
  return blocks;
}

// Rows row_of(0) .. row_of(n - 1), which differ.
template <class F>
void catch_up(const RowTable& table, int64_t n, const F& row_of) {
  const int64_t ahead = rows_ahead(table);
  const auto& kernels = LLMKERN_SELECT(row_optim);
  parallel_for(n, rows_in(kGrain, table.D), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = row_of(i);
      kernels.catch_up(table, row, table.applied[row], row_of(std::min(i + ahead, n - 1)));
      table.applied[row] = static_cast<int32_t>(table.count);
    }
  });
}

}  // namespace

void row_lookup(const RowTable& table, Indices indices, int64_t N, void* out) {
  const int64_t bytes = table.D * itemsize(table.dtype), ahead = rows_ahead(table);
  const auto& kernels = LLMKERN_SELECT(row_optim);
  const auto inside = [&](int64_t row) { return static_cast<uint64_t>(row) < static_cast<uint64_t>(table.V); };
  const bool stream = N * bytes >= kLookupStreamBytes;
  std::atomic<bool> bad{false};
  parallel_for(N, rows_in(kGrain, table.D), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = indices[i], later = indices[std::min(i + ahead, N - 1)];
      if (!inside(row)) {
        bad.store(true, std::memory_order_relaxed);
        return;
      }
      char* const to = at(out, i * table.D, table.dtype);
      if (table.applied[row] == table.count)
        std::memcpy(to, at(table.param, row * table.D, table.dtype), bytes);
      else
        kernels.lookup(table, row, table.applied[row], inside(later) ? later : row, stream, to);
    }
  });
  if (bad) throw_index_error();
}

void row_catch_up(const RowTable& table, const RowOrder& batch) {
  catch_up(table, batch.runs(), [&](int64_t r) { return batch.rows()[r]; });
}

void row_catch_up(const RowTable& table) {
  catch_up(table, table.V, [](int64_t row) { return row; });
}

bool row_step(const RowTable& table, const RowStep& step, double grad_scale, const RowOrder& batch,
              const void* values) {
  const auto& kernels = LLMKERN_SELECT(row_optim);
  alignas(double) unsigned char rule[sizeof RowRecord::rule];
  kernels.make_rule(table, step, grad_scale, rule);
  const int64_t ahead = rows_ahead(table);
  int64_t total;
  const std::vector<ColumnBlock> blocks = blocks_of(table, batch, &total);
  parallel_for(total, rows_in(kGrain, table.D), [&](int64_t from, int64_t to) {
    auto block = std::lower_bound(blocks.begin(), blocks.end(), from,
                                  [](const ColumnBlock& p, int64_t cost) { return p.cost_before < cost; });
    for (; block != blocks.end() && block->cost_before < to; ++block) {
      const int64_t row = batch.rows()[block->run], start = batch.starts()[block->run];
      const int64_t next = std::min(block->run + ahead, batch.runs() - 1);
      kernels.step(table, rule, row, table.applied[row], batch.rows()[next], values, batch.order() + start,
                   batch.starts()[block->run + 1] - start, batch.order()[batch.starts()[next]], block->begin,
                   block->end);
    }
  });
  const bool recorded = changes_idle_rows(table.rule.kind, step);
  for (int64_t r = 0; r < batch.runs(); ++r)
    table.applied[batch.rows()[r]] = static_cast<int32_t>(table.count + recorded);
  if (recorded) append(table, step);
  return recorded;
}

}  // namespace llmkern::cpu
