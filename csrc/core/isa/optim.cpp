#include "core/optim.h"

#include "core/isa/optim_rules.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// T: parameter and gradient; Q: states.
template <class T, class Q, class Rule, class Op>
void sweep(const Op& op, const OptimTensor& tensor, int64_t begin, int64_t end) {
  using S = Accum<T>;
  using V = Vec<S>;
  constexpr int L = kLanes<S>, n_states = Rule::kStates;
  const Rule rule(op, tensor.step);
  T *const param = static_cast<T*>(tensor.param), *const grad = static_cast<T*>(tensor.grad);
  const S scale = static_cast<S>(op.grad_scale);
  const auto update = [&](int64_t i, auto get, auto put) {
    V p = get(param + i), states[n_states + 1];
    const V g = get(grad + i);
    for (int k = 0; k < n_states; ++k) states[k] = get(static_cast<const Q*>(tensor.states[k]) + i);
    rule.update(p, g, states);
    for (int k = 0; k < n_states; ++k) put(static_cast<Q*>(tensor.states[k]) + i, states[k]);
    put(param + i, p);
    if (op.after != After::keep) put(grad + i, op.after == After::zero ? V{} : scale * g);
  };
  int64_t i = begin;
  for (; i + L <= end; i += L) update(i, [](const auto* p) { return load<S>(p); }, [](auto* p, V v) { store(p, v); });
  if (const int n = static_cast<int>(end - i); n > 0)
    update(i, [n](const auto* p) { return load<S>(p, n, S{0}); }, [n](auto* p, V v) { store(p, v, n); });
}

// Rule<S, extra>, by the types of the tensor.
template <template <class, bool> class Rule, bool extra, class Op>
void dispatch(const Op& op, const OptimTensor& tensor, int64_t begin, int64_t end) {
  visit(tensor.dtype, [&](auto t) {
    using T = decltype(t);
    using R = Rule<Accum<T>, extra>;
    if (tensor.state_dtype == tensor.dtype)
      sweep<T, T, R>(op, tensor, begin, end);
    else
      sweep<T, Accum<T>, R>(op, tensor, begin, end);
  });
}

void adam(const Adam& op, const OptimTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.states[2])
    dispatch<AdamRule, true>(op, tensor, begin, end);
  else
    dispatch<AdamRule, false>(op, tensor, begin, end);
}

void sgd(const Sgd& op, const OptimTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.states[0])
    dispatch<SgdRule, true>(op, tensor, begin, end);
  else
    dispatch<SgdRule, false>(op, tensor, begin, end);
}

void adagrad(const Adagrad& op, const OptimTensor& tensor, int64_t begin, int64_t end) {
  dispatch<AdagradRule, false>(op, tensor, begin, end);
}

}  // namespace

extern const OptimKernels optim{.adam = &adam, .sgd = &sgd, .adagrad = &adagrad};

}  // namespace llmkern::cpu::LLMKERN_ISA
