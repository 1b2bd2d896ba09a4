#include "core/optim.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

template <class T>
void adam(const Adam& op, const AdamTensor& tensor, int64_t begin, int64_t end) {
  using S = Accum<T>;
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  T* const param = static_cast<T*>(tensor.param);
  const T* const grad = static_cast<const T*>(tensor.grad);
  T *const avg = static_cast<T*>(tensor.exp_avg), *const avg_sq = static_cast<T*>(tensor.exp_avg_sq);
  T* const max_sq = static_cast<T*>(tensor.max_exp_avg_sq);
  const double correction1 = 1 - ::pow(op.beta1, tensor.step), correction2 = 1 - ::pow(op.beta2, tensor.step);
  const S step_size = static_cast<S>(op.lr / correction1), root = static_cast<S>(::sqrt(correction2));
  const S weight1 = static_cast<S>(1 - op.beta1), weight2 = static_cast<S>(1 - op.beta2);
  const S beta2 = static_cast<S>(op.beta2), eps = static_cast<S>(op.eps), sign = op.maximize ? S{-1} : S{1};
  const S decay = static_cast<S>(op.weight_decay), shrink = static_cast<S>(1 - op.lr * op.weight_decay);
  const bool l2 = op.weight_decay != 0 && !op.decoupled, decoupled = op.weight_decay != 0 && op.decoupled;
  const auto update = [&](int64_t i, auto get, auto put) {
    V p = get(param + i), g = sign * get(grad + i);
    if (decoupled) p = p * shrink;
    if (l2) g = g + decay * p;
    V m = get(avg + i), v = get(avg_sq + i);
    // torch's lerp takes the end that loses less.
    m = weight1 < S{0.5} ? m + weight1 * (g - m) : g - (g - m) * (1 - weight1);
    v = v * beta2 + weight2 * g * g;
    put(avg + i, m), put(avg_sq + i, v);
    if (max_sq) {
      v = max(get(max_sq + i), v);
      put(max_sq + i, v);
    }
    put(param + i, p - step_size * m / (sqrt(v) / root + eps));
  };
  int64_t i = begin;
  for (; i + L <= end; i += L) update(i, [](const T* p) { return load<S>(p); }, [](T* p, V v) { store(p, v); });
  if (const int n = static_cast<int>(end - i); n > 0)
    update(i, [n](const T* p) { return load<S>(p, n, S{0}); }, [n](T* p, V v) { store(p, v, n); });
}

void adam_any(const Adam& op, const AdamTensor& tensor, int64_t begin, int64_t end) {
  visit(tensor.dtype, [&](auto t) { adam<decltype(t)>(op, tensor, begin, end); });
}

}  // namespace

extern const OptimKernels optim{&adam_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
