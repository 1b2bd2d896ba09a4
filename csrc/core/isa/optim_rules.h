// What an optimizer does to one vector of elements, in registers; who loads and stores them is the caller's business.
//
// A rule has kStates states per element and update(p, g, states): parameter, gradient and states, the first and the
// last in place. The same rule gives the same bits wherever it is applied: products are fused into sums where fma says
// so and nowhere else (CMakeLists.txt), and an element does not depend on its neighbours. The order of operations is
// that of torch's single-tensor functions, fused multiply-adds included.
#pragma once
#include "core/isa/simd.h"
#include "core/optim.h"

namespace llmkern::cpu::LLMKERN_ISA {

// States: exp_avg, exp_avg_sq and with amsgrad max_exp_avg_sq. `step` counts from 1.
template <class S, bool amsgrad>
struct AdamRule {
  using V = Vec<S>;
  static constexpr int kStates = amsgrad ? 3 : 2;

  AdamRule(const Adam& op, double step)
      : factor(static_cast<S>(op.maximize ? -op.grad_scale : op.grad_scale)),
        l2(static_cast<S>(op.decoupled ? 0 : op.weight_decay)),
        shrink(static_cast<S>(op.decoupled ? 1 - op.lr * op.weight_decay : 1)),
        weight1(static_cast<S>(1 - op.beta1)),
        weight2(static_cast<S>(1 - op.beta2)),
        beta2(static_cast<S>(op.beta2)),
        eps(static_cast<S>(op.eps)),
        step_size(static_cast<S>(op.lr / (1 - ::pow(op.beta1, step)))),
        root(static_cast<S>(::sqrt(1 - ::pow(op.beta2, step)))) {}

  [[gnu::always_inline]] void update(V& p, V g, V* states) const {
    V &m = states[0], &v = states[1];
    g = factor * g;
    if (l2 != 0) g = fma(splat(l2), p, g);
    // torch's lerp takes the end that loses less.
    m = weight1 < S{0.5} ? fma(splat(weight1), g - m, m) : fma(splat(weight1 - 1), g - m, g);
    v = fma(weight2 * g, g, v * beta2);
    V largest = v;
    if constexpr (amsgrad) largest = states[2] = max(states[2], v);
    p = p * shrink - step_size * m / (sqrt(largest) / root + eps);
  }

  S factor, l2, shrink, weight1, weight2, beta2, eps, step_size, root;
};

// States: with momentum its buffer, which the first step only writes.
template <class S, bool momentum>
struct SgdRule {
  using V = Vec<S>;
  static constexpr int kStates = momentum ? 1 : 0;

  SgdRule(const Sgd& op, double step)
      : factor(static_cast<S>(op.maximize ? -op.grad_scale : op.grad_scale)),
        l2(static_cast<S>(op.weight_decay)),
        keep(static_cast<S>(op.momentum)),
        take(static_cast<S>(1 - op.dampening)),
        minus_lr(static_cast<S>(-op.lr)),
        first(step == 1),
        nesterov(op.nesterov) {}

  [[gnu::always_inline]] void update(V& p, V g, V* states) const {
    g = factor * g;
    if (l2 != 0) g = fma(splat(l2), p, g);
    if constexpr (momentum) {
      V& buffer = states[0];
      buffer = first ? g : fma(splat(take), g, buffer * keep);
      g = nesterov ? fma(splat(keep), buffer, g) : buffer;
    }
    p = fma(splat(minus_lr), g, p);
  }

  S factor, l2, keep, take, minus_lr;
  bool first, nesterov;
};

// State: the sum of squares.
template <class S, bool = false>
struct AdagradRule {
  using V = Vec<S>;
  static constexpr int kStates = 1;

  AdagradRule(const Adagrad& op, double step)
      : factor(static_cast<S>(op.maximize ? -op.grad_scale : op.grad_scale)),
        l2(static_cast<S>(op.weight_decay)),
        eps(static_cast<S>(op.eps)),
        step_size(static_cast<S>(op.lr / (1 + (step - 1) * op.lr_decay))) {}

  [[gnu::always_inline]] void update(V& p, V g, V* states) const {
    V& sum = states[0];
    g = factor * g;
    if (l2 != 0) g = fma(splat(l2), p, g);
    sum = fma(g, g, sum);
    p = p - step_size * g / (sqrt(sum) + eps);
  }

  S factor, l2, eps, step_size;
};

// States: exp_avg, exp_avg_sq.
template <class S, bool = false>
struct SparseAdamRule {
  using V = Vec<S>;
  static constexpr int kStates = 2;

  SparseAdamRule(const SparseAdam& op, double)
      : factor(static_cast<S>(op.maximize ? -op.grad_scale : op.grad_scale)),
        weight1(static_cast<S>(1 - op.beta1)),
        weight2(static_cast<S>(1 - op.beta2)),
        eps(static_cast<S>(op.eps)),
        step_size(static_cast<S>(op.step_size)) {}

  [[gnu::always_inline]] void update(V& p, V g, V* states) const {
    V &m = states[0], &v = states[1];
    g = factor * g;
    m = m + weight1 * (g - m);
    v = v + weight2 * (g * g - v);
    p = p - step_size * (m / (sqrt(v) + eps));
  }

  S factor, weight1, weight2, eps, step_size;
};

}  // namespace llmkern::cpu::LLMKERN_ISA
