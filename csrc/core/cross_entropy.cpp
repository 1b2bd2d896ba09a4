// Cross-entropy from logits.
//
// Traffic: outputs read the N*V logits once from memory; with the gradient N*V are written once as well. torch makes
// 8-9 passes over memory for the same. A row is taken in blocks: one sweep finds a block's maximum, one its
// exponentials e = exp(z - max of the block), kept in a scratch row in the L2 cache, and their sum. Once all blocks are
// known, a last sweep turns e into the gradient. One exp per element.
//
// Arithmetic (about 20 instructions a vector) takes as long as the traffic, so the two must not take turns: the
// exponentials of a block fetch the next, and between them the gradient of the row before is written.
//
// Rows are shared out among the threads; if there are fewer rows than threads, a row's blocks are. Classes that do not
// lie side by side (D > 1) are transposed into scratch rows, as many as a cache line holds, and their gradients back.
//
// Asked for with the outputs, the gradient is precomputed for the cotangents that will come: functional knows the
// reduction, and so the factor of each row. ops/_losses.py keeps it for the backward, and calls this function again if
// others come: then the blocks are summed again, and the bits are the same.
#include "core/cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "core/memory.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // elements that are worth a thread
constexpr int64_t kGroup = 16;         // rows that are transposed together

// One call: what its rows share.
template <class A>
struct LossCall {
  const CrossEntropy& op;
  const CrossEntropyOutputs& outputs;
  const CrossEntropyCotangents& cotangents;
  const CrossEntropyKernels& kernels = LLMKERN_SELECT(cross_entropy);
  bool stream, wants_gradient, needs_u;
  double keep = 1 - op.label_smoothing, rest = op.label_smoothing / static_cast<double>(op.V);
  Buffer<A> w{op.weight ? static_cast<size_t>(op.V) : 0};  // class weights
  // u of index targets, which is one for all rows; without class weights it is the number `rest`.
  Buffer<A> shared_u{op.weight && op.label_smoothing != 0 && op.target ? static_cast<size_t>(op.V) : 0};

  LossCall(const CrossEntropy& op, const CrossEntropyOutputs& outputs, const CrossEntropyCotangents& cotangents,
           const CrossEntropyGradients& gradients)
      : op(op), outputs(outputs), cotangents(cotangents) {
    const int64_t bytes = op.N * op.V * op.D * itemsize(gradients.dtype);
    stream = bytes > kStreamBytes && op.D == 1;
    wants_gradient = gradients.dlogits || gradients.dtarget;
    // Probabilities that need neither factor nor conversion are u themselves.
    needs_u = op.probabilities && (op.weight || op.label_smoothing != 0 || op.target_dtype != accum_of(op.dtype));
    if (op.weight) kernels.targets(op.weight, op.weight_dtype, nullptr, 1, 0, op.V, w.get());
    if (shared_u_used()) kernels.targets(nullptr, accum_of(op.dtype), w.get(), 0, rest, op.V, shared_u.get());
  }
  const A* weights() const { return op.weight ? w.get() : nullptr; }
  bool shared_u_used() const { return op.weight && op.label_smoothing != 0 && op.target; }
  double uniform() const { return op.target ? rest : 0; }
  int64_t blocks() const { return ceil_div(op.V, kCrossEntropyBlock); }
};

// What a thread needs for a row.
template <class A>
struct RowScratch {
  Buffer<A> e, u;
  Buffer<CrossEntropyPart> parts;

  explicit RowScratch(const LossCall<A>& call)
      : e(call.wants_gradient ? call.op.V : 0), u(call.needs_u ? call.op.V : 0), parts(call.blocks()) {}
};

// One row, in phases that can be shared out by blocks: reduce, combine, gradient.
template <class A>
struct LossRow {
  const LossCall<A>& call;
  const CrossEntropy& op;  // of the call, or with the dtypes of scratch rows
  const RowScratch<A>& scratch;
  int64_t i;
  const void *x, *t;  // t: this row's probabilities
  void *dx, *dt;
  DType dx_dtype;
  CrossEntropyFactors k{};

  int64_t begin(int64_t s) const { return s * kCrossEntropyBlock; }
  int64_t size(int64_t s) const { return std::min(kCrossEntropyBlock, op.V - begin(s)); }
  const void* logits(int64_t v) const { return at(x, v, op.dtype); }
  const A* u(int64_t v) const {
    if (call.needs_u) return scratch.u.get() + v;
    if (op.probabilities) return static_cast<const A*>(t) + v;
    return call.shared_u_used() ? call.shared_u.get() + v : nullptr;
  }
  static double value(const void* p, int64_t i) { return p ? static_cast<const A*>(p)[i] : 0.0; }
  static void put(void* p, int64_t i, double value) {
    if (p) static_cast<A*>(p)[i] = static_cast<A>(value);
  }

  // `last`: a row whose gradient is written meanwhile, or null.
  void reduce(int64_t s0, int64_t s1, const LossRow* last = nullptr) const {
    const bool entropy = call.outputs.entropy || call.cotangents.entropy;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t v = begin(s), n = size(s);
      const void* const from = at(t, v, op.target_dtype);
      if (call.needs_u)
        call.kernels.targets(from, op.target_dtype, call.weights() ? call.weights() + v : nullptr, call.keep, call.rest,
                             n, scratch.u.get() + v);
      const auto job = last ? last->gradient_of(s) : CrossEntropyBlockGradient{};
      call.kernels.reduce(op, logits(v), u(v), call.uniform(), n, entropy,
                          call.wants_gradient ? scratch.e.get() + v : nullptr, &scratch.parts[s],
                          last ? &job : nullptr);
    }
  }

  void combine() {
    const double inf = std::numeric_limits<double>::infinity();
    double most = -inf, sum = 0, total = 0, weighted = 0, moment = 0;
    for (int64_t s = 0; s < call.blocks(); ++s) most = std::max(most, scratch.parts[s].max);
    // A row of -inf, or with +inf, has no softmax: everything that follows is NaN, as torch has it.
    const double m = std::isinf(most) ? std::numeric_limits<double>::quiet_NaN() : most;
    for (int64_t s = 0; s < call.blocks(); ++s) {
      const CrossEntropyPart& part = scratch.parts[s];
      const double factor = part.max == -inf ? 0 : std::exp(part.base - m);
      sum += factor * part.sum;
      total += part.total;
      weighted += part.weighted + part.total * (part.base - m);
      if (part.max != -inf) moment += factor * (part.entropy + part.sum * (part.base - m));
    }
    const double log_sum = std::log(sum), lse = m + log_sum, entropy = log_sum - moment / sum;
    double own = 0, loss = 0;
    if (op.target) {
      const int64_t y = op.target[i];
      own = call.keep * (call.weights() ? static_cast<double>(call.weights()[y]) : 1.0);
      loss = own * (log_sum - (call.kernels.logit(op, logits(y)) - m));
    }
    if (op.probabilities || call.rest != 0) loss += total * log_sum - weighted;
    if (op.z_loss != 0) loss += op.z_loss * lse * lse;
    put(call.outputs.loss, i, loss);
    put(call.outputs.entropy, i, entropy);
    put(call.outputs.lse, i, std::isinf(most) && find(m) < 0 ? most : lse);
    const double g = value(call.cotangents.loss, i), g_entropy = value(call.cotangents.entropy, i);
    k.p = 1 / sum;
    k.m = m;
    k.log_sum = log_sum;
    k.loss = g;
    k.entropy = g_entropy;
    k.own = g * own;
    k.softmax = g * (own + total + 2 * op.z_loss * lse) + value(call.cotangents.lse, i);
    if (g_entropy != 0) k.softmax += g_entropy * (log_sum - entropy);
    k.uniform = call.uniform();
    k.keep = call.keep;
    if (call.outputs.argmax) call.outputs.argmax[i] = std::max<int64_t>(0, find(most));
  }

  // The first z that equals `value` or is NaN, or -1.
  int64_t find(double value) const {
    for (int64_t s = 0; s < call.blocks(); ++s) {
      const CrossEntropyPart& part = scratch.parts[s];
      if (part.max != value && !std::isnan(part.sum)) continue;
      const int64_t found = call.kernels.find(op, logits(begin(s)), size(s), value);
      if (found >= 0) return begin(s) + found;
    }
    return -1;
  }

  CrossEntropyBlockGradient gradient_of(int64_t s) const {
    const int64_t v = begin(s), n = size(s), y = op.target ? op.target[i] - v : -1;
    const CrossEntropyPart& part = scratch.parts[s];
    CrossEntropyFactors of_block = k;
    of_block.p *= std::isinf(part.max) && part.max < 0 ? 0 : std::exp(part.base - k.m);
    return {of_block,
            logits(v),
            u(v),
            call.weights() ? call.weights() + v : nullptr,
            scratch.e.get() + v,
            n,
            y < n ? std::max<int64_t>(y, -1) : -1,
            at(dx, v, dx_dtype),
            dx_dtype,
            call.stream,
            at(dt, v, op.target_dtype)};
  }
  void gradient(int64_t s0, int64_t s1) const {
    for (int64_t s = s0; s < s1; ++s) call.kernels.gradient(op, gradient_of(s));
  }

  bool ignored() const { return op.target && op.target[i] == op.ignore_index; }
  void skip() const {
    for (void* p : {call.outputs.loss, call.outputs.lse, call.outputs.entropy}) put(p, i, 0);
    if (call.outputs.argmax) call.outputs.argmax[i] = -1;
    if (dx) std::memset(dx, 0, op.V * itemsize(dx_dtype));
  }
  void run() {
    if (ignored()) return skip();
    reduce(0, call.blocks());
    combine();
    if (call.wants_gradient) gradient(0, call.blocks());
  }
};

// Classes side by side.
template <class A>
void rows(const LossCall<A>& call, const void* logits, const CrossEntropyGradients& gradients) {
  const CrossEntropy& op = call.op;
  // Gradients that are narrower than the logits whose place they take: their blocks lie over logits of other blocks.
  const bool inplace = gradients.dlogits == logits, narrowed = inplace && gradients.dtype != op.dtype;
  const auto row = [&](const RowScratch<A>& scratch, int64_t i) {
    const auto of = [&](auto* p, DType dtype) { return at(p, i * op.V, dtype); };
    return LossRow<A>{call,
                      op,
                      scratch,
                      i,
                      of(logits, op.dtype),
                      of(op.probabilities, op.target_dtype),
                      of(gradients.dlogits, inplace ? op.dtype : gradients.dtype),
                      of(gradients.dtarget, op.target_dtype),
                      gradients.dtype};
  };
  if (op.N >= threads_of_region() || call.blocks() == 1 || narrowed)
    return parallel_for(op.N, rows_in(kGrain, op.V), [&](int64_t begin, int64_t end) {
      // The gradient of a row is written while the next is reduced: memory and arithmetic keep each other company.
      const RowScratch<A> scratch[2] = {RowScratch<A>(call), RowScratch<A>(call)};
      std::optional<LossRow<A>> last;
      int free = 0;
      for (int64_t i = begin; i < end; ++i) {
        LossRow<A> next = row(scratch[free], i);
        if (next.ignored()) {
          next.skip();
          continue;
        }
        next.reduce(0, call.blocks(), last ? &*last : nullptr);
        next.combine();
        if (call.wants_gradient) {
          last.emplace(next);
          free ^= 1;
        }
      }
      if (last) last->gradient(0, call.blocks());
    });
  const RowScratch<A> scratch(call);
  for (int64_t i = 0; i < op.N; ++i) {
    LossRow<A> one = row(scratch, i);
    if (one.ignored()) {
      one.skip();
      continue;
    }
    constexpr int64_t kBlocks = kGrain / kCrossEntropyBlock;
    parallel_for(call.blocks(), kBlocks, [&](int64_t begin, int64_t end) { one.reduce(begin, end); });
    one.combine();
    if (call.wants_gradient)
      parallel_for(call.blocks(), kBlocks, [&](int64_t begin, int64_t end) { one.gradient(begin, end); });
  }
}

// Classes D elements apart.
template <class A>
void transposed_rows(const LossCall<A>& call, const void* logits, const CrossEntropyGradients& gradients) {
  const CrossEntropy& op = call.op;
  CrossEntropy wide = op;
  wide.dtype = accum_of(op.dtype);
  if (op.probabilities) wide.target_dtype = wide.dtype;
  const int64_t groups = ceil_div(op.D, kGroup);
  parallel_for(op.N * groups, rows_in(kGrain, op.V * kGroup), [&](int64_t begin, int64_t end) {
    const RowScratch<A> scratch(call);
    const size_t size = static_cast<size_t>(kGroup * op.V);
    const Buffer<A> x(size), t(op.probabilities ? size : 0), dt(gradients.dtarget ? size : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, d = item % groups * kGroup, width = std::min(kGroup, op.D - d);
      const int64_t origin = n * op.V * op.D + d;
      const auto gather = [&](const void* from, DType dtype, A* to) {
        call.kernels.transpose({.data = at(from, origin, dtype), .dtype = dtype, .ld = op.D}, op.V, width,
                               {.data = to, .dtype = wide.dtype, .ld = op.V});
      };
      const auto scatter = [&](const A* from, void* to, DType dtype) {
        call.kernels.transpose({.data = from, .dtype = wide.dtype, .ld = op.V}, width, op.V,
                               {.data = at(to, origin, dtype), .dtype = dtype, .ld = op.D});
      };
      gather(logits, op.dtype, x.get());
      if (op.probabilities) gather(op.probabilities, op.target_dtype, t.get());
      for (int64_t r = 0; r < width; ++r) {
        A* const own = x.get() + r * op.V;
        LossRow<A>{call,
                   wide,
                   scratch,
                   n * op.D + d + r,
                   own,
                   op.probabilities ? t.get() + r * op.V : nullptr,
                   gradients.dlogits ? own : nullptr,
                   gradients.dtarget ? dt.get() + r * op.V : nullptr,
                   wide.dtype}
            .run();
      }
      if (gradients.dlogits) scatter(x.get(), gradients.dlogits, gradients.dtype);
      if (gradients.dtarget) scatter(dt.get(), gradients.dtarget, op.target_dtype);
    }
  });
}

}  // namespace

void check_targets(const CrossEntropy& op) {
  if (!op.target) return;
  std::atomic<int64_t> bad{op.ignore_index};
  parallel_for(op.N * op.D, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = op.target[i];
      if (y != op.ignore_index && static_cast<uint64_t>(y) >= static_cast<uint64_t>(op.V)) return bad.store(y);
    }
  });
  if (bad != op.ignore_index) throw std::out_of_range("Target " + std::to_string(bad) + " is out of bounds.");
}

void cross_entropy(const CrossEntropy& op, const void* logits, const CrossEntropyOutputs& outputs,
                   const CrossEntropyCotangents& cotangents, const CrossEntropyGradients& gradients) {
  check_targets(op);
  const auto run = [&](auto call) {
    op.D == 1 ? rows(call, logits, gradients) : transposed_rows(call, logits, gradients);
  };
  if (op.dtype == DType::f64)
    run(LossCall<double>(op, outputs, cotangents, gradients));
  else
    run(LossCall<float>(op, outputs, cotangents, gradients));
}

}  // namespace llmkern::cpu
