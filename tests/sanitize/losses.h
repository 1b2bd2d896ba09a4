// What the checks of cross_entropy and linear_cross_entropy share: targets, cotangents, and what they give in plain
// double loops.
#pragma once
#include "core/cross_entropy.h"
#include "sanitize.h"

namespace llmkern::sanitize {

enum class Ignored { none, some, all };

struct LossOptions {
  bool probabilities, weighted;
  double label_smoothing, z_loss, softcap, logit_scale;
  Ignored ignored = Ignored::some;  // index targets only
};

inline constexpr LossOptions kLossOptions[] = {
    {false, false, 0, 0, 0, 1},   {false, true, 0.1, 0, 0, -2}, {false, false, 0.2, 0.01, 3, 2},
    {false, true, 0, 0.01, 2, 1}, {true, false, 0, 0, 0, 1},    {true, true, 0.1, 0.01, 0, -2},
    {true, true, 0, 0, 3, 4},
};

// What is asked for, or given, as bits of a number.
inline constexpr int kLoss = 1, kLse = 2, kEntropy = 4, kArgmax = 8, kOutputs = 15, kCotangents = 7;

// Targets and cotangents of N * D rows of V classes of logits in `dtype`, and what is right for them.
struct LossCase {
  cpu::CrossEntropy op{};
  LossOptions options;
  std::vector<int64_t> target;
  Array probabilities, weight, dloss, dlse, dentropy;
  Doubles z, loss, lse, entropy;            // z as logits lie, (N, V, D); else (N, D)
  Doubles by_loss, by_lse, by_entropy, dt;  // gradients as logits lie, times the cotangents

  LossCase(DType dtype, int64_t N, int64_t V, int64_t D, const LossOptions& options);
  // Logits as they lie.
  void expect(const Doubles& logits);
  cpu::CrossEntropyCotangents cotangents(int given) const;
  // dlogits for those cotangents.
  Doubles dlogits(int given) const;
  // Of gradients of logits: what terms may be that cancel.
  double floor() const { return 0.125 / static_cast<double>(op.V); }
  bool ignored(int64_t row) const { return !target.empty() && target[row] == op.ignore_index; }

 private:
  void expect_row(int64_t row, int64_t first, const Doubles& x);
};

// Results, NaN (argmax: kUnset) before they are written.
struct LossOutputs {
  static constexpr int64_t kUnset = -7;
  Array loss, lse, entropy;
  std::vector<int64_t> argmax;

  explicit LossOutputs(const LossCase& c);
  cpu::CrossEntropyOutputs pointers(int wanted = kOutputs);
  // What was wanted is right, the rest untouched.
  void compare(const LossCase& c, int wanted, const Doubles& logits) const;
};

// For a gradient whose terms are as large as its largest element, or `floor`; rounded to `t` on its way.
void near_gradient(const char* what, const Array& got, const Doubles& want, DType t, double floor);

}  // namespace llmkern::sanitize
