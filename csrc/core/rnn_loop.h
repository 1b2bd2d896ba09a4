// What the forward and the backward time loop share: where tokens lie, which thread does what, weights as panels.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/gemm.h"
#include "core/memory.h"
#include "core/rnn_norm.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu::rnn {

inline int64_t even(int64_t n) { return n + n % 2; }  // rows of pairs are of even length

struct Range {
  int64_t begin, end;
};

// Where the rows of a step lie in the tensors of tokens, whatever their layout.
class Tokens {
 public:
  explicit Tokens(const Rnn& op) : op_(op), first_(static_cast<size_t>(op.T) + 1) {
    for (int64_t t = 0; t < op.T; ++t) first_[t + 1] = first_[t] + rows(t);
  }
  int64_t total() const { return first_[op_.T]; }
  int64_t rows(int64_t t) const { return op_.batch_sizes ? op_.batch_sizes[t] : op_.B; }
  int64_t first(int64_t t) const { return op_.batch_first ? t : first_[t]; }
  int64_t stride() const { return op_.batch_first ? op_.T : 1; }
  // The time of the s-th step.
  int64_t time(int64_t s) const { return op_.reverse ? op_.T - 1 - s : s; }
  // How many sequences have a step before the s-th; a packed sequence in reverse begins at its own end.
  int64_t rows_before(int64_t s) const { return s == 0 ? 0 : std::min(rows(time(s - 1)), rows(time(s))); }
  Range all() const { return {.begin = 0, .end = op_.B}; }
  // How many of the first sequences have about this fraction of all tokens.
  int64_t sequences(double fraction) const {
    if (!op_.batch_sizes) return static_cast<int64_t>(static_cast<double>(op_.B) * fraction + 0.5);
    int64_t b = 0, sum = 0, t = op_.T;
    for (; b < op_.B && static_cast<double>(sum) < fraction * static_cast<double>(total()) - 0.5; ++b) {
      while (t > 0 && rows(t - 1) <= b) --t;
      sum += t;
    }
    return b;
  }

 private:
  const Rnn& op_;
  std::vector<int64_t> first_;
};

// Meets all threads of a team. They spin, because a step takes microseconds; not for long, because there may be fewer
// cores than threads.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    if (threads_ == 1) return;
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 1 << 12) std::this_thread::yield();
#if defined(__x86_64__)
      else
        __builtin_ia32_pause();
#endif
    }
  }

 private:
  int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

// A step's work is dealt out by sequences, which never meet, or by units, and then all threads meet after each product.
struct Plan {
  int threads;
  bool by_units;

  explicit Plan(const Rnn& op) {
    // Multiply-adds of a step of all sequences.
    const int64_t macs = op.B * (gates_of(op.mode) * op.H * op.P / op.heads + (op.weight_hr ? op.H * op.P : 0));
    const int64_t most = threads_of_region(), total = macs * op.T;
    threads = static_cast<int>(std::clamp<int64_t>(total / kMacsPerThread, 1, most));
    // Few sequences do not share what a panel's load costs. Where all panels fit a thread's own cache, it costs little.
    const bool large = macs / op.B * itemsize(op.dtype) > kOwnBytes;
    by_units = op.B < (large ? kRowsPerThread : kLeastRows) * threads;
    // Meeting costs more than it saves where a step is short.
    if (by_units && !op.norms && macs < kMacsPerStep) threads = 1;
    if (threads == 1) by_units = false;
    // A norm needs all units of a sequence.
    if (op.norms) {
      by_units = false;
      threads = static_cast<int>(std::min<int64_t>(threads, op.B));
    }
  }

  static constexpr int64_t kMacsPerThread = 1 << 18, kMacsPerStep = 1 << 17;
  static constexpr int64_t kRowsPerThread = 48, kLeastRows = 8, kOwnBytes = 1 << 20;
};

// The index-th of `count` ranges of nearly equal length that make up [0, n).
inline Range nth_range(int64_t n, int64_t index, int64_t count) {
  return {.begin = n * index / count, .end = n * (index + 1) / count};
}

// What one thread does: all panels of both products for some sequences, or some panels for all. `thread` counts from 0.
struct Partition {
  int thread;
  Range sequences, panels, projected;
};

// Calls f(partition, barrier), which may not throw, once for each thread of the plan.
template <class F>
void for_partitions(const Plan& plan, const Tokens& tokens, int64_t panels, int64_t projected, const F& f) {
  Barrier barrier(plan.by_units ? plan.threads : 1);
  const auto alone = [&](int index, int count) {
    Barrier none(1);
    const Range sequences{.begin = tokens.sequences(1.0 * index / count),
                          .end = tokens.sequences(1.0 * (index + 1) / count)};
    f(Partition{.thread = index,
                .sequences = sequences,
                .panels = {.begin = 0, .end = panels},
                .projected = {.begin = 0, .end = projected}},
      none);
  };
  if (plan.threads == 1) return alone(0, 1);
#pragma omp parallel num_threads(plan.threads)
  {
    const int count = omp_get_num_threads(), index = omp_get_thread_num();
    if (!plan.by_units)
      alone(index, count);
    else if (count == plan.threads)
      f(Partition{.thread = index,
                  .sequences = tokens.all(),
                  .panels = nth_range(panels, index, count),
                  .projected = nth_range(projected, index, count)},
        barrier);
    else if (index == 0)
      // A smaller team than was asked for, which the barrier would wait for: right, if not fast.
      alone(0, 1);
  }
}

// Calls f(begin, rows) on [begin, end) in blocks of nearly equal length, of at most `longest`.
template <class F>
void blocks(int64_t begin, int64_t end, int64_t longest, const F& f) {
  const int64_t n = end - begin;
  if (n <= 0) return;
  const int64_t count = ceil_div(n, longest);
  for (int64_t i = 0; i < count; ++i) {
    const Range range = nth_range(n, i, count);
    f(begin + range.begin, static_cast<int>(range.end - range.begin));
  }
}

// The kernels of sums in S.
template <class S>
struct Kernels {
  const RnnKernels& rnn = LLMKERN_SELECT(rnn);
  const RnnNormKernels& norm = LLMKERN_SELECT(rnn_norm);
  const GemmTable& gemm = LLMKERN_SELECT(gemm);
  int lanes() const { return std::is_same_v<S, float> ? rnn.lanes_f32 : rnn.lanes_f64; }
  const GemmKernels<S>& packing(bool pairs) const {
    if constexpr (std::is_same_v<S, float>)
      return pairs ? gemm.pairs : gemm.f32;
    else
      return gemm.f64;
  }
  // n elements that lie side by side.
  void copy(int64_t n, const void* from, DType from_dtype, void* to, DType to_dtype, bool accumulate = false) const {
    rnn.copy(1, n, {.data = from, .dtype = from_dtype}, {.data = to, .dtype = to_dtype}, accumulate);
  }
  void product(int rows, int vectors, int64_t K, const void* a, int64_t lda, const void* panel, bool pairs,
               bool accumulate, S* to) const {
    (std::is_same_v<S, float> ? rnn.product_f32 : rnn.product_f64)(rows, vectors, K, a, lda, panel, pairs, accumulate,
                                                                   to);
  }
};

// What numbers are in: sums and states, and the operands of the loop's products. Those are taken from pairs of bf16
// where the CPU multiplies them; a pair may not lie across two heads.
struct Types {
  explicit Types(const Rnn& op)
      : wide(accum_of(op.dtype)),
        pairs(op.dtype == DType::bf16 && gemm_multiplies_bf16() && (op.heads == 1 || op.H / op.heads % 2 == 0)),
        operand(pairs ? DType::bf16 : wide) {}
  DType wide;
  bool pairs;
  DType operand;
};

// A layer, and what follows from it alone.
template <class S>
struct RnnProblem {
  explicit RnnProblem(const Rnn& op) : op(op), types(op), tokens(op) {}
  const Rnn& op;
  const Types types;
  const Kernels<S> kernels{};
  const Tokens tokens;
};

// What x W_ih^T starts from (G H), then gru's bias of h (H); zeros where there is none.
template <class S>
void merge_biases(const RnnProblem<S>& p, S* bias) {
  const Rnn& op = p.op;
  const DType wide = p.types.wide;
  const int64_t H = op.H, rows = gates_of(op.mode) * H, merged = op.mode == RnnMode::gru ? 2 * H : rows;
  std::fill_n(bias, rows + H, S{0});
  if (op.bias_ih) p.kernels.copy(rows, op.bias_ih, op.dtype, bias, wide, true);
  if (op.bias_hh) p.kernels.copy(merged, op.bias_hh, op.dtype, bias, wide, true);
  if (op.bias_hh && merged < rows) p.kernels.copy(H, at(op.bias_hh, merged, op.dtype), op.dtype, bias + rows, wide);
}

// Most numbers of one product's result: rows by vectors by lanes.
constexpr int64_t kTile = 6 * 4 * 16;

// A matrix (K, N) for the loop's products, packed into panels of a few vectors of columns ("units"). k may come in
// chunks: each takes the operand's columns from `column` on.
template <class S>
class Panels {
 public:
  struct Chunk {
    int64_t k, depth, column;
  };
  // Units [first, first + count) of a matrix: element (k, unit) lies at w[k + unit * ld] or, `by_rows`, at
  // w[k * ld + unit - first]. With several gates a panel is a vector of units of each, `apart` units from one another.
  struct Source {
    const void* w;
    int64_t ld;
    bool by_rows = false;
    int64_t first = 0, count;
    int gates = 1;
    int64_t apart = 0;
  };
  struct Panel {
    int64_t unit, units;
    int vectors;
    Source source;
    std::vector<Chunk> chunks;
    const char* data = nullptr;
  };

  explicit Panels(const RnnProblem<S>& p) : kernels_(p.kernels), dtype_(p.op.dtype), types_(p.types), data_(0) {}

  void add(const Source& source, const std::vector<Chunk>& chunks) {
    const int64_t L = kernels_.lanes(), width = source.gates > 1 ? L : 4 * L;
    for (int64_t u = 0; u < source.count; u += width) {
      const int64_t units = std::min(width, source.count - u);
      panels_.push_back({.unit = source.first + u,
                         .units = units,
                         .vectors = source.gates > 1 ? source.gates : static_cast<int>(ceil_div(units, L)),
                         .source = source,
                         .chunks = chunks});
    }
  }

  void pack() {
    std::vector<int64_t> offset{0};
    for (const Panel& panel : panels_) {
      int64_t steps = 0;
      for (const Chunk& chunk : panel.chunks) steps += steps_of(chunk);
      offset.push_back(offset.back() + steps * panel.vectors * kernels_.lanes());
    }
    data_ = Buffer<S>(offset.back());
    parallel_for(static_cast<int64_t>(panels_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        S* to = data_.get() + offset[p];
        panels_[p].data = reinterpret_cast<const char*>(to);
        for (const Chunk& chunk : panels_[p].chunks) to = pack_chunk(panels_[p], chunk, to);
      }
    });
  }

  int64_t count() const { return static_cast<int64_t>(panels_.size()); }
  const Panel& operator[](int64_t p) const { return panels_[p]; }
  // The units of panels [begin, end).
  Range units(const Range& range) const {
    if (range.begin == range.end) return {.begin = 0, .end = 0};
    const Panel& last = panels_[range.end - 1];
    return {.begin = panels_[range.begin].unit, .end = last.unit + last.units};
  }

  // The operand's rows [begin, end), `lda` apart, times the panel: done(row, rows, sums) with the sums (rows, vectors,
  // lanes) of each block of rows.
  template <class F>
  void multiply(int64_t p, int64_t begin, int64_t end, const void* a, int64_t lda, S* sums, const F& done) const {
    const Panel& panel = panels_[p];
    blocks(begin, end, kernels_.rnn.rows, [&](int64_t row, int rows) {
      const char* data = panel.data;
      for (const Chunk& chunk : panel.chunks) {
        const int64_t steps = steps_of(chunk);
        kernels_.product(rows, panel.vectors, steps, at(a, row * lda + chunk.column, types_.operand), lda, data,
                         types_.pairs, &chunk != &panel.chunks[0], sums);
        data += steps * panel.vectors * kernels_.lanes() * static_cast<int64_t>(sizeof(S));
      }
      done(row, rows, sums);
    });
  }

 private:
  int64_t steps_of(const Chunk& chunk) const { return types_.pairs ? ceil_div(chunk.depth, 2) : chunk.depth; }

  S* pack_chunk(const Panel& panel, const Chunk& chunk, S* to) const {
    const int64_t L = kernels_.lanes();
    const Source& from = panel.source;
    const bool gates = from.gates > 1;
    const Matrix matrix{.data = from.w, .dtype = dtype_, .ld = from.ld, .transposed = from.by_rows};
    for (int v = 0; v < panel.vectors; ++v, to += steps_of(chunk) * L) {
      const int64_t unit = panel.unit - (from.by_rows ? from.first : 0) + v * (gates ? from.apart : L);
      const int64_t n = std::min<int64_t>(L, panel.units - (gates ? 0 : v * L));
      // Reading on past the last unit stays inside the matrix for none but the last of its columns.
      kernels_.packing(types_.pairs)
          .pack(matrix, from.by_rows ? from.ld : unit + n, unit, static_cast<int>(n), chunk.k, chunk.depth,
                static_cast<int>(L), to);
    }
    return to;
  }

  const Kernels<S>& kernels_;
  DType dtype_;
  const Types types_;
  std::vector<Panel> panels_;
  Buffer<S> data_;
};

// Whether weights are better read where they lie than packed, and the forward that does so; see rnn_step.cpp.
bool few_tokens(const Rnn& op);
bool few_steps(const Rnn& op);
void run_steps(const Rnn& op, const RnnOutputs& out);

}  // namespace llmkern::cpu::rnn
