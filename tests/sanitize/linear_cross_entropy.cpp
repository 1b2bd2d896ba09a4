#include "core/linear_cross_entropy.h"

#include "losses.h"

namespace llmkern::sanitize {
namespace {

// Gradients that are wanted, as bits of a number.
constexpr int kX = 1, kWeight = 2, kBias = 4, kTarget = 8, kAll = 15;

struct Size {
  int64_t N, H, V;
};

struct Case {
  LossCase c;
  Array x, weight, bias;
  Doubles xs, ws, logits;
  cpu::LinearCrossEntropy op{};

  Case(DType t, const Size& size, const LossOptions& options, bool biased)
      : c(accum_of(t), size.N, size.V, 1, options),
        x(random(t, size.N * size.H)),
        weight(random(t, size.V * size.H)),
        bias(random(t, biased ? size.V : 0)),
        xs(x.doubles()),
        ws(weight.doubles()),
        logits(size.N * size.V) {
    const auto [N, H, V] = size;
    where = std::string("linear_cross_entropy ") + name_of(t) + " " + std::to_string(N) + "x" + std::to_string(H) +
            "x" + std::to_string(V) + (options.probabilities ? " probabilities" : "") + (biased ? " bias" : "") +
            (options.weighted ? " weight" : "") + " ignored " + std::to_string(static_cast<int>(options.ignored));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t v = 0; v < V; ++v) {
        double& z = logits[n * V + v] = biased ? bias[v] : 0;
        for (int64_t h = 0; h < H; ++h) z += xs[n * H + h] * ws[v * H + h];
      }
    c.expect(logits);
    op = {c.op, H, t, x.data(), weight.data(), biased ? bias.data() : nullptr, 0};
  }

  // Of three chunks or so, with the last one shorter; of single rows; all rows at once.
  std::vector<int64_t> workspaces() const { return {8 * op.loss.V * (op.loss.N / 3 + 1), 1, int64_t{1} << 30}; }

  Array results(bool wanted, int64_t n) const { return Array(op.dtype, wanted ? n : 0); }

  void run(int given, int wanted_outputs, int wanted) {
    const int64_t N = op.loss.N, V = op.loss.V, H = op.H;
    const Array dx = results(wanted & kX, N * H), dweight = results(wanted & kWeight, V * H),
                dbias = results(wanted & kBias, V),
                dtarget(op.loss.target_dtype, wanted & kTarget && op.loss.probabilities ? N * V : 0);
    const auto pointer = [](const Array& a) { return a.n ? a.data() : nullptr; };
    LossOutputs out(c);
    cpu::linear_cross_entropy(op, out.pointers(wanted_outputs), c.cotangents(given),
                              {pointer(dx), pointer(dweight), pointer(dbias), pointer(dtarget)});
    out.compare(c, wanted_outputs, logits);
    const Doubles g = c.dlogits(given);
    Doubles dxs(dx.n), dws(dweight.n), dbs(dbias.n);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t v = 0; v < V; ++v) {
        if (dbias.n) dbs[v] += g[n * V + v];
        for (int64_t h = 0; h < H; ++h) {
          if (dx.n) dxs[n * H + h] += g[n * V + v] * ws[v * H + h];
          if (dweight.n) dws[v * H + h] += g[n * V + v] * xs[n * H + h];
        }
      }
    near_gradient("dx", dx, dxs, op.dtype, 0.125);
    near_gradient("dlinear_weight", dweight, dws, op.dtype, 0.125);
    near_gradient("dlinear_bias", dbias, dbs, op.dtype, 0.125);
    if (dtarget.n) near_gradient("dtarget", dtarget, given & kLoss ? c.dt : Doubles(dtarget.n), dtarget.dtype, 0.125);
  }

  void everything() {
    for (int64_t workspace : workspaces()) {
      op.workspace = workspace;
      run(0, kOutputs, 0);
      run(kLoss, kLoss | kLse, kAll);
      run(kCotangents, 0, kAll);
    }
    op.workspace = workspaces()[0];
    for (int wanted = 0; wanted <= kAll; ++wanted) run(wanted % 8, wanted, wanted);
    out_of_range();
  }

  void out_of_range() {
    if (c.target.empty()) return;
    const int64_t before = c.target.back();
    for (int64_t bad : {c.op.V, int64_t{-1}, INT64_MIN}) {
      c.target.back() = bad;
      LossOutputs out(c);
      const Array dx = results(true, x.n), dweight = results(true, weight.n), dbias = results(true, c.op.V);
      throws<std::out_of_range>("linear_cross_entropy", [&] {
        cpu::linear_cross_entropy(op, out.pointers(), c.cotangents(kLoss),
                                  {dx.data(), dweight.data(), dbias.data(), nullptr});
      });
      out.compare(c, 0, logits);
      untouched("dx", dx);
      untouched("dlinear_weight", dweight);
      untouched("dlinear_bias", dbias);
    }
    c.target.back() = before;
  }
};

}  // namespace

LLMKERN_CHECK(linear_cross_entropy) {
  for (DType t : kDTypes) {
    for (LossOptions options : kLossOptions)
      for (const Size& size : {Size{1, 3, 5}, Size{7, 19, 67}, Size{23, 35, 131}})
        for (Ignored ignored : {Ignored::none, Ignored::some, Ignored::all}) {
          options.ignored = ignored;
          Case(t, size, options, size.N % 4 == 3 && ignored != Ignored::none).everything();
        }
    // As many rows and classes as threads share; several blocks; no rows.
    for (int index : {0, 3, 5}) {
      Case(t, {70, 33, 515}, kLossOptions[index], true).everything();
      Case(t, {3, 5, 2 * cpu::kCrossEntropyBlock + 3}, kLossOptions[index], false).everything();
      Case(t, {0, 7, 9}, kLossOptions[index], true).everything();
    }
  }
}

}  // namespace llmkern::sanitize
