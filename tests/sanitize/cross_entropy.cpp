#include <limits>

#include "losses.h"

namespace llmkern::sanitize {
namespace {

// What stands for one size and dtype: logits that begin `skip` elements into their block, so that vectors are not
// aligned.
struct Case {
  LossCase c;
  int64_t skip;
  Array logits;
  Doubles x;

  Case(DType t, int64_t N, int64_t V, int64_t D, const LossOptions& options, int64_t skip = 0)
      : c(t, N, V, D, options), skip(skip), logits(random(t, N * V * D, skip)), x(logits.doubles()) {
    where = std::string("cross_entropy ") + name_of(t) + " " + std::to_string(N) + "x" + std::to_string(V) + "x" +
            std::to_string(D) + (options.probabilities ? " probabilities" : "") + (options.weighted ? " weight" : "") +
            " smoothing " + std::to_string(options.label_smoothing) + " softcap " + std::to_string(options.softcap);
    c.expect(x);
  }

  Array like_logits(DType t) const { return Array(t, logits.n, skip); }

  // Without gradients; every output, and each alone.
  void outputs_alone() const {
    for (int wanted : {kOutputs, kLoss, kLse, kEntropy, kArgmax}) {
      LossOutputs out(c);
      cpu::cross_entropy(c.op, logits.data(), out.pointers(wanted), {}, {});
      out.compare(c, wanted, x);
    }
  }

  // dlogits of dtype t and dtarget, with outputs and without.
  void gradients(int given, int wanted, DType t) const {
    LossOutputs out(c);
    const Array dlogits = like_logits(t), dtarget(c.op.target_dtype, c.probabilities.n);
    void* const dt = c.op.probabilities ? dtarget.data() : nullptr;
    cpu::cross_entropy(c.op, logits.data(), out.pointers(wanted), c.cotangents(given), {dlogits.data(), t, dt});
    out.compare(c, wanted, x);
    near_gradient("dlogits", dlogits, c.dlogits(given), t, c.floor());
    if (!dt) return;
    const Doubles none(dtarget.n), &expected = given & kLoss ? c.dt : none;
    near_gradient("dtarget", dtarget, expected, dtarget.dtype, c.floor());
    const Array alone(dtarget.dtype, dtarget.n);
    cpu::cross_entropy(c.op, logits.data(), {}, c.cotangents(given), {nullptr, t, alone.data()});
    near_gradient("dtarget alone", alone, expected, dtarget.dtype, c.floor());
  }

  void in_place(int given) const {
    LossOutputs out(c);
    const Array both = like_logits(logits.dtype);
    if (logits.n) std::memcpy(both.data(), logits.data(), logits.n * itemsize(logits.dtype));
    const Array dtarget(c.op.target_dtype, c.probabilities.n);
    void* const dt = c.op.probabilities ? dtarget.data() : nullptr;
    cpu::cross_entropy(c.op, both.data(), out.pointers(), c.cotangents(given), {both.data(), both.dtype, dt});
    out.compare(c, kOutputs, x);
    near_gradient("dlogits in place", both, c.dlogits(given), both.dtype, c.floor());
    if (dt) near_gradient("dtarget in place", dtarget, c.dt, dtarget.dtype, c.floor());
  }

  // A target out of range: the last one, and nothing is written.
  void out_of_range() {
    if (c.target.empty()) return;
    for (int64_t bad : {c.op.V, int64_t{-1}, INT64_MIN}) {
      c.target.back() = bad;
      LossOutputs out(c);
      const Array dlogits = like_logits(logits.dtype);
      throws<std::out_of_range>("cross_entropy", [&] {
        cpu::cross_entropy(c.op, logits.data(), out.pointers(), c.cotangents(kCotangents),
                           {dlogits.data(), dlogits.dtype, nullptr});
      });
      out.compare(c, 0, x);
      untouched("dlogits", dlogits);
    }
  }

  void everything() {
    outputs_alone();
    for (int given = 0; given <= kCotangents; ++given) gradients(given, given % 2 ? kOutputs : 0, logits.dtype);
    if (logits.dtype == DType::f32) {
      gradients(kLoss, kLoss | kArgmax, DType::bf16);
      gradients(7, 0, DType::bf16);
    }
    in_place(kLoss);
    in_place(kCotangents);
    out_of_range();
  }
};

// Rows without a softmax, or with one of few classes: of results only what is an index may be right or wrong.
void check_strange_logits(DType t, int64_t V, int64_t D) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const LossOptions& options : kLossOptions)
    for (double strange : {-kInf, kInf, std::nan(""), 3e4})
      for (int64_t every : {1, 3, 1000}) {
        const Case one(t, 3, V, D, options);
        const LossCase& c = one.c;
        for (int64_t i = 0; i < one.logits.n; i += every) one.logits.set(i, strange);
        LossOutputs out(c);
        const Array dlogits = one.like_logits(t), dtarget(c.op.target_dtype, c.probabilities.n);
        cpu::cross_entropy(c.op, one.logits.data(), out.pointers(), c.cotangents(kCotangents),
                           {dlogits.data(), t, c.op.probabilities ? dtarget.data() : nullptr});
        for (int64_t row = 0; row < 3 * D; ++row)
          if (out.argmax[row] < (c.ignored(row) ? -1 : 0) || out.argmax[row] >= V) fail("argmax: out of range");
      }
}

// Gradients that go past the caches, aligned and not.
void check_large() {
  for (const auto& [t, N, V, skip] :
       {std::tuple{DType::f32, 140, 32000, 0}, {DType::f32, 140, 32003, 1}, {DType::bf16, 280, 32003, 0}}) {
    const Case one(t, N, V, 1, kLossOptions[skip], skip);
    one.gradients(kLoss, kOutputs, t);
    one.in_place(kCotangents);
  }
}

}  // namespace

LLMKERN_CHECK(cross_entropy) {
  constexpr int64_t kBlock = cpu::kCrossEntropyBlock;
  for (DType t : kDTypes) {
    for (LossOptions options : kLossOptions) {
      for (int64_t V : {1, 7, 33, 67, 515})
        for (int64_t N : {1, 6}) Case(t, N, V, 1, options).everything();
      // Classes apart: less and more than what is transposed together.
      for (const auto& [N, V, D] : {std::array<int64_t, 3>{1, 1, 2}, {3, 7, 17}, {4, 67, 16}, {2, 515, 33}})
        Case(t, N, V, D, options).everything();
      Case(t, 3, 2 * kBlock + 1, 2, options).everything();
      Case(t, 1, kBlock, 1, options).everything();
      Case(t, 40, kBlock + 3, 1, options, 1).everything();
      for (int64_t D : {1, 3}) Case(t, 0, 7, D, options).everything();
      for (Ignored ignored : {Ignored::none, Ignored::all}) {
        options.ignored = ignored;
        Case(t, 5, 65, 1, options).everything();
        Case(t, 2, 9, 18, options).everything();
      }
    }
    // Fewer rows than threads: blocks are shared out. Of index targets the second row is ignored.
    for (int index : {1, 2, 5}) Case(t, 2, 24 * kBlock + 3, 1, kLossOptions[index], 1).everything();
    check_strange_logits(t, 67, 1);
    check_strange_logits(t, 2 * kBlock + 5, 1);
    check_strange_logits(t, 21, 18);
  }
  check_large();
}

}  // namespace llmkern::sanitize
