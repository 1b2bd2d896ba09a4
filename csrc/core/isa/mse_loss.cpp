#include "core/mse_loss.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// The difference of n elements, zeros past them.
template <class T>
Vec<Accum<T>> difference(const T* x, const T* t, int n) {
  using A = Accum<T>;
  return load_n<A>(x, n) - load_n<A>(t, n);
}

// Where gradients go: dx, and dt = -dx; either may be null.
template <class T>
struct MseGradients {
  T *dx, *dt;
  bool stream_dx, stream_dt;

  MseGradients(T* dx, T* dt, bool stream)
      : dx(dx), dt(dt), stream_dx(stream && aligned(dx)), stream_dt(stream && aligned(dt)) {}
  void put(int64_t i, Vec<Accum<T>> g, int n) const {
    if (dx) put(dx + i, g, n, stream_dx);
    if (dt) put(dt + i, -g, n, stream_dt);
  }

 private:
  static bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
  static void put(T* to, Vec<Accum<T>> g, int n, bool stream) {
    if (n < kLanes<Accum<T>>)
      store(to, g, n);
    else if (stream)
      store_streaming(to, g);
    else
      store(to, g);
  }
};

// Four independent sums hide the latency of the addition. each(i, d, n) gets every difference.
template <class T, class F>
double sum(const T* x, const T* t, int64_t n, const F& each) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  Vec<A> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec<A> d = difference(x + i + v * L, t + i + v * L, L);
      s[v] += d * d;
      each(i + v * L, d, L);
    }
  for (; i < n; i += L) {
    const int m = n - i < L ? static_cast<int>(n - i) : L;
    const Vec<A> d = difference(x + i, t + i, m);
    s[0] += d * d;
    each(i, d, m);
  }
  return static_cast<double>(reduce_add<A>((s[0] + s[1]) + (s[2] + s[3])));
}

template <class T>
void forward(const T* x, const T* t, int64_t n, T* out) {
  for_vectors<Accum<T>>(n, [&](int64_t i, int lanes) {
    const auto d = difference(x + i, t + i, lanes);
    store_n(out + i, d * d, lanes);
  });
}

template <class T>
void backward(const T* g, Accum<T> dsum, const T* x, const T* t, int64_t n, const MseGradients<T>& to) {
  using A = Accum<T>;
  for_vectors<A>(n, [&](int64_t i, int lanes) {
    const Vec<A> twice = g ? 2 * load_n<A>(g + i, lanes) : splat<A>(2 * dsum);
    to.put(i, difference(x + i, t + i, lanes) * twice, lanes);
  });
}

double sum_any(const void* input, const void* target, DType dtype, int64_t n, double dsum, void* dinput, void* dtarget,
               bool stream) {
  return visit(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accum<T>;
    const T *x = static_cast<const T*>(input), *t = static_cast<const T*>(target);
    if (!dinput && !dtarget) return sum(x, t, n, [](int64_t, Vec<A>, int) {});
    const MseGradients<T> to(static_cast<T*>(dinput), static_cast<T*>(dtarget), stream);
    const Vec<A> twice = splat<A>(2 * static_cast<A>(dsum));
    return sum(x, t, n, [&](int64_t i, Vec<A> d, int m) { to.put(i, d * twice, m); });
  });
}

void forward_any(const void* input, const void* target, DType dtype, int64_t n, void* out) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    forward(static_cast<const T*>(input), static_cast<const T*>(target), n, static_cast<T*>(out));
  });
}

void backward_any(const void* dloss, double dsum, const void* input, const void* target, DType dtype, int64_t n,
                  void* dinput, void* dtarget, bool stream) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    backward(static_cast<const T*>(dloss), static_cast<Accum<T>>(dsum), static_cast<const T*>(input),
             static_cast<const T*>(target), n,
             MseGradients<T>(static_cast<T*>(dinput), static_cast<T*>(dtarget), stream));
  });
}

}  // namespace

extern const MseLossKernels mse_loss{.sum = &sum_any, .forward = &forward_any, .backward = &backward_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
