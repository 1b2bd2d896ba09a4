#include "core/mse_loss.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

template <class T>
Vec<Accum<T>> square(const T* x, const T* t) {
  const Vec<Accum<T>> d = load<Accum<T>>(x) - load<Accum<T>>(t);
  return d * d;
}

// Four independent sums hide the latency of the addition; the tail fills up with zeros.
template <class T>
double sum(const T* x, const T* t, int64_t n) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  Vec<A> s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    s0 += square(x + i, t + i), s1 += square(x + i + L, t + i + L);
    s2 += square(x + i + 2 * L, t + i + 2 * L), s3 += square(x + i + 3 * L, t + i + 3 * L);
  }
  for (; i < n; i += L) {
    const int m = n - i < L ? static_cast<int>(n - i) : L;
    const Vec<A> d = load<A>(x + i, m, A{}) - load<A>(t + i, m, A{});
    s0 += d * d;
  }
  return static_cast<double>(reduce_add<A>((s0 + s1) + (s2 + s3)));
}

template <class T>
void forward(const T* x, const T* t, int64_t n, T* out) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, square(x + i, t + i));
  if (i < n) {
    const int m = static_cast<int>(n - i);
    const Vec<A> d = load<A>(x + i, m, A{}) - load<A>(t + i, m, A{});
    store(out + i, d * d, m);
  }
}

template <class T>
void backward(const T* g, Accum<T> dsum, const T* x, const T* t, int64_t n, T* dx, T* dt) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  Vec<A> twice = splat<A>(2 * dsum);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    if (g) twice = 2 * load<A>(g + i);
    const Vec<A> d = (load<A>(x + i) - load<A>(t + i)) * twice;
    if (dx) store(dx + i, d);
    if (dt) store(dt + i, -d);
  }
  if (i < n) {
    const int m = static_cast<int>(n - i);
    if (g) twice = 2 * load<A>(g + i, m, A{});
    const Vec<A> d = (load<A>(x + i, m, A{}) - load<A>(t + i, m, A{})) * twice;
    if (dx) store(dx + i, d, m);
    if (dt) store(dt + i, -d, m);
  }
}

double sum_any(const void* input, const void* target, DType dtype, int64_t n) {
  return visit(dtype, [&](auto type) {
    using T = decltype(type);
    return sum(static_cast<const T*>(input), static_cast<const T*>(target), n);
  });
}

void forward_any(const void* input, const void* target, DType dtype, int64_t n, void* out) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    forward(static_cast<const T*>(input), static_cast<const T*>(target), n, static_cast<T*>(out));
  });
}

void backward_any(const void* dloss, double dsum, const void* input, const void* target, DType dtype, int64_t n,
                  void* dinput, void* dtarget) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    backward(static_cast<const T*>(dloss), static_cast<Accum<T>>(dsum), static_cast<const T*>(input),
             static_cast<const T*>(target), n, static_cast<T*>(dinput), static_cast<T*>(dtarget));
  });
}

}  // namespace

extern const MseLossKernels mse_loss{&sum_any, &forward_any, &backward_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
