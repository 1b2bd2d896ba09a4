// See losses.h.
#include "losses.h"

namespace llmkern::sanitize {
namespace {

// Targets and weights need not be of the logits' dtype, unless that is f64.
DType companion(DType t) {
  if (t == DType::f32) return DType::bf16;
  return t == DType::bf16 ? DType::f32 : t;
}

}  // namespace

LossCase::LossCase(DType dtype, int64_t N, int64_t V, int64_t D, const LossOptions& options)
    : options(options),
      probabilities(companion(dtype), options.probabilities ? N * V * D : 0),
      weight(random(companion(dtype), V)),
      dloss(random(accum_of(dtype), N * D)),
      dlse(random(accum_of(dtype), N * D)),
      dentropy(random(accum_of(dtype), N * D)) {
  op.N = N;
  op.V = V;
  op.D = D;
  op.dtype = dtype;
  op.ignore_index = V > 2 && N % 2 ? 1 : -100;
  op.label_smoothing = options.label_smoothing;
  op.z_loss = options.z_loss;
  op.softcap = options.softcap;
  op.logit_scale = options.logit_scale;
  op.target_dtype = op.weight_dtype = companion(dtype);
  if (options.weighted) op.weight = weight.data();
  if (options.probabilities) {
    for (int64_t i = 0; i < probabilities.n; ++i) probabilities.set(i, uniform() / static_cast<double>(V));
    op.probabilities = probabilities.data();
    return;
  }
  for (int64_t i = 0; i < N * D; ++i) {
    const bool skip = options.ignored == Ignored::all || (options.ignored == Ignored::some && i % 3 == 1);
    // Another than ignore_index: the last class, and others.
    const int64_t y = (i * 7 + V - 1) % V;
    target.push_back(skip ? op.ignore_index : y == op.ignore_index ? 0 : y);
  }
  target.shrink_to_fit();
  op.target = target.data();
}

void LossCase::expect(const Doubles& logits) {
  const int64_t rows = op.N * op.D, size = rows * op.V;
  loss.assign(rows, 0);
  lse.assign(rows, 0);
  entropy.assign(rows, 0);
  for (Doubles* x : {&z, &by_loss, &by_lse, &by_entropy, &dt}) x->assign(size, 0);
  for (int64_t n = 0; n < op.N; ++n)
    for (int64_t d = 0; d < op.D; ++d)
      if (!ignored(n * op.D + d)) expect_row(n * op.D + d, n * op.V * op.D + d, logits);
}

// With u[v] = w[v] (t[v] (1 - e) + e / V), t one-hot for an index: loss = sum u (lse - z) + z_loss lse^2.
void LossCase::expect_row(int64_t row, int64_t first, const Doubles& x) {
  const int64_t V = op.V;
  const double e = op.label_smoothing, cap = op.softcap;
  Doubles u(V), slope(V);
  double sum = 0, moment = 0, total = 0;
  for (int64_t v = 0; v < V; ++v) {
    const int64_t i = first + v * op.D;
    const double raw = op.logit_scale * x[i], squashed = cap != 0 ? std::tanh(raw / cap) : 0;
    const double t = op.target ? (target[row] == v ? 1 : 0) : probabilities[i];
    z[i] = cap != 0 ? cap * squashed : raw;
    slope[v] = op.logit_scale * (1 - squashed * squashed);
    u[v] = (op.weight ? weight[v] : 1) * (t * (1 - e) + e / static_cast<double>(V));
    total += u[v];
    sum += std::exp(z[i]);
    moment += z[i] * std::exp(z[i]);
  }
  const double all = lse[row] = std::log(sum), mean = moment / sum;
  entropy[row] = all - mean;
  loss[row] = op.z_loss * all * all;
  for (int64_t v = 0; v < V; ++v) {
    const int64_t i = first + v * op.D;
    const double p = std::exp(z[i] - all);
    loss[row] += u[v] * (all - z[i]);
    by_loss[i] = dloss[row] * slope[v] * ((total + 2 * op.z_loss * all) * p - u[v]);
    by_lse[i] = dlse[row] * slope[v] * p;
    by_entropy[i] = dentropy[row] * slope[v] * -p * (z[i] - mean);
    dt[i] = dloss[row] * (op.weight ? weight[v] : 1) * (1 - e) * (all - z[i]);
  }
}

cpu::CrossEntropyCotangents LossCase::cotangents(int given) const {
  return {given & kLoss ? dloss.data() : nullptr, given & kLse ? dlse.data() : nullptr,
          given & kEntropy ? dentropy.data() : nullptr};
}

Doubles LossCase::dlogits(int given) const {
  Doubles sum(by_loss.size());
  for (const auto& [bit, part] : {std::pair{kLoss, &by_loss}, {kLse, &by_lse}, {kEntropy, &by_entropy}})
    for (size_t i = 0; given & bit && i < sum.size(); ++i) sum[i] += (*part)[i];
  return sum;
}

LossOutputs::LossOutputs(const LossCase& c)
    : loss(accum_of(c.op.dtype), c.op.N * c.op.D),
      lse(accum_of(c.op.dtype), c.op.N * c.op.D),
      entropy(accum_of(c.op.dtype), c.op.N * c.op.D),
      argmax(c.op.N * c.op.D, kUnset) {}

cpu::CrossEntropyOutputs LossOutputs::pointers(int wanted) {
  return {wanted & kLoss ? loss.data() : nullptr, wanted & kLse ? lse.data() : nullptr,
          wanted & kEntropy ? entropy.data() : nullptr, wanted & kArgmax ? argmax.data() : nullptr};
}

void LossOutputs::compare(const LossCase& c, int wanted, const Doubles& logits) const {
  wanted& kLoss ? near("loss", loss, c.loss, 4) : untouched("loss", loss);
  wanted& kLse ? near("lse", lse, c.lse, 4) : untouched("lse", lse);
  wanted& kEntropy ? near("entropy", entropy, c.entropy, 4) : untouched("entropy", entropy);
  const int64_t V = c.op.V, D = c.op.D;
  for (int64_t row = 0; row < c.op.N * D; ++row) {
    const int64_t got = argmax[row], first = row / D * V * D + row % D;
    if (!(wanted & kArgmax) || c.ignored(row)) {
      if (got != (wanted & kArgmax ? -1 : kUnset)) fail("argmax: got " + std::to_string(got));
      continue;
    }
    if (got < 0 || got >= V) fail("argmax: out of range");
    for (int64_t v = 0; v < V; ++v) {
      // Rounding may make a tie of what differs in double, never the other way round.
      const int64_t i = first + v * D, best = first + got * D;
      if (c.z[i] > c.z[best] + 1e-4 || (v < got && logits[i] == logits[best])) fail("argmax: not the first largest");
    }
  }
}

void near_gradient(const char* what, const Array& got, const Doubles& want, DType t, double floor) {
  if (got.n != static_cast<int64_t>(want.size())) fail(std::string(what) + ": sizes differ");
  double most = floor;
  for (double x : want) most = std::max(most, std::abs(x));
  // Where the type is wide, it is the sums' rounding that counts; in f64 that of these loops, too.
  const double bound = (itemsize(t) == 2 ? 8 : t == DType::f32 ? 64 : 512) * epsilon(t) * most;
  for (int64_t i = 0; i < got.n; ++i)
    if (!(std::abs(got[i] - want[i]) <= bound))
      fail(std::string(what) + "[" + std::to_string(i) + "]: got " + text(got[i]) + ", expected " + text(want[i]));
}

}  // namespace llmkern::sanitize
