#include "core/sparse_optim.h"

#include "core/isa/optim_rules.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

void sum(const RowGradient& grad, const uint32_t* positions, int64_t count, int64_t next, void* sum) {
  visit(grad.dtype, [&](auto t) {
    using T = decltype(t);
    using S = Accum<T>;
    const T* const values = static_cast<const T*>(grad.values);
    S* const out = static_cast<S*>(sum);
    const auto row = [&](int64_t j) { return values + positions[j] * grad.D; };
    for_vectors<S>(grad.D, [&](int64_t i, int n) {
      __builtin_prefetch(values + next * grad.D + i);
      store_n(out + i, load_n<S>(row(0) + i, n), n);
    });
    for (int64_t j = 1; j < count; ++j)
      for_vectors<S>(grad.D,
                     [&](int64_t i, int n) { store_n(out + i, load_n<S>(out + i, n) + load_n<S>(row(j) + i, n), n); });
  });
}

// T: parameter; Q: states.
template <class T, class Q, class Rule, class Op>
void sweep(const Op& op, const OptimTable& table, int64_t row, int64_t next, const Accum<T>* grad, int64_t D) {
  using S = Accum<T>;
  constexpr int n_states = Rule::kStates;
  const Rule rule(op, table.step);
  T *const param = static_cast<T*>(table.param) + row * D, *const ahead = static_cast<T*>(table.param) + next * D;
  for_vectors<S>(D, [&](int64_t i, int n) {
    Vec<S> p = load_n<S>(param + i, n), states[n_states + 1];
    __builtin_prefetch(ahead + i, 1);
    for (int k = 0; k < n_states; ++k) {
      const Q* const state = static_cast<const Q*>(table.states[k]) + i;
      states[k] = load_n<S>(state + row * D, n);
      __builtin_prefetch(state + next * D, 1);
    }
    rule.update(p, load_n<S>(grad + i, n), states);
    for (int k = 0; k < n_states; ++k) store_n(static_cast<Q*>(table.states[k]) + row * D + i, states[k], n);
    store_n(param + i, p, n);
  });
}

template <template <class, bool> class Rule, class Op>
void step(const Op& op, const RowGradient& grad, const OptimTable& table, int64_t row, int64_t next, const void* sum) {
  visit(grad.dtype, [&](auto t) {
    using T = decltype(t);
    using S = Accum<T>;
    if (table.state_dtype == grad.dtype)
      sweep<T, T, Rule<S, false>>(op, table, row, next, static_cast<const S*>(sum), grad.D);
    else
      sweep<T, S, Rule<S, false>>(op, table, row, next, static_cast<const S*>(sum), grad.D);
  });
}

void rowwise_adagrad(const RowWiseAdagrad& op, const RowGradient& grad, const OptimTable& table, int64_t row,
                     int64_t next, const void* sum) {
  visit(grad.dtype, [&](auto t) {
    using T = decltype(t);
    using S = Accum<T>;
    const S* const g = static_cast<const S*>(sum);
    T *const rows = static_cast<T*>(table.param), *const param = rows + row * grad.D;
    const S scale = static_cast<S>(op.grad_scale);
    Vec<S> squares{};
    for_vectors<S>(grad.D, [&](int64_t i, int n) {
      __builtin_prefetch(rows + next * grad.D + i, 1);
      const Vec<S> x = scale * load_n<S>(g + i, n);
      squares = fma(x, x, squares);
    });
    S& total = static_cast<S*>(table.states[0])[row];
    total += reduce_add<S>(squares) / static_cast<S>(grad.D);
    const double factor = op.lr / (::sqrt(static_cast<double>(total)) + op.eps) * op.grad_scale;
    const S by = static_cast<S>(op.maximize ? factor : -factor);
    for_vectors<S>(grad.D, [&](int64_t i, int n) {
      store_n(param + i, fma(splat(by), load_n<S>(g + i, n), load_n<S>(param + i, n)), n);
    });
  });
}

}  // namespace

extern const SparseOptimKernels sparse_optim{.sum = &sum,
                                             .sgd = &step<SgdRule, Sgd>,
                                             .adagrad = &step<AdagradRule, Adagrad>,
                                             .sparse_adam = &step<SparseAdamRule, SparseAdam>,
                                             .rowwise_adagrad = &rowwise_adagrad};

}  // namespace llmkern::cpu::LLMKERN_ISA
