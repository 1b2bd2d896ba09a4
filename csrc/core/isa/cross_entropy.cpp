#include "core/cross_entropy.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// Calls f(v, n) for every vector of [0, V); n = lanes in use.
template <class A, class F>
inline void for_vectors(int64_t V, const F& f) {
  constexpr int L = kLanes<A>;
  int64_t v = 0;
  for (; v + L <= V; v += L) f(v, L);
  if (v < V) f(v, static_cast<int>(V - v));
}

template <class A, class T>
inline Vec<A> load_n(const T* p, int n, A fill) {
  return n == kLanes<A> ? load<A>(p) : load<A>(p, n, fill);
}

template <class T>
struct Row {
  using A = Accum<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const CrossEntropy& op;
  const T* x;
  const T* w;
  int64_t y;
  A weight_sum;

  A weight_of(int64_t v) const { return w ? load_one(w + v) : A{1}; }
  A smoothing() const { return static_cast<A>(op.label_smoothing) / static_cast<A>(op.V); }

  // The logit as the softmax sees it, and its derivative by the raw logit.
  template <bool kCap>
  V z(V raw) const {
    const A s = static_cast<A>(op.logit_scale);
    if constexpr (!kCap) return raw * s;
    const A cap = static_cast<A>(op.softcap);
    return cap * tanh(raw * (s / cap));
  }
  template <bool kCap>
  V dz(V raw) const {
    const A s = static_cast<A>(op.logit_scale);
    if constexpr (!kCap) return splat(s);
    const V t = tanh(raw * (s / static_cast<A>(op.softcap)));
    return s * (1 - t * t);
  }

  // The gradient; probability(v, n, raw, 1 / sum) = exp(z - max) / sum, for a vector of logits.
  template <bool kCap, class E>
  void gradient(A scale, const A* stats, T* dx, bool stream, const E& probability) const {
    const A lse = stats[0] + log_of(stats[1]), inverse = 1 / stats[1];
    const A e = static_cast<A>(op.label_smoothing), ew = smoothing();
    const A own = (1 - e) * weight_of(y);
    const A total = scale * (own + (e != 0 ? ew * weight_sum : A{0}) + 2 * static_cast<A>(op.z_loss) * lse);
    const A uniform = scale * ew;
    stream = stream && reinterpret_cast<uintptr_t>(dx) % kVectorBytes == 0 && sizeof(T) == sizeof(A);
    for_vectors<A>(op.V, [&](int64_t v, int n) {
      const V raw = load_n<A>(x + v, n, A{0});
      V g = total * probability(v, n, raw, inverse);
      if (uniform != 0) g -= w ? uniform * load_n<A>(w + v, n, A{0}) : splat(uniform);
      g *= dz<kCap>(raw);
      if (n < L)
        store(dx + v, g, n);
      else if (stream)
        store_streaming(dx + v, g);
      else
        store(dx + v, g);
    });
    // The target's own term: p - 1 is exact near 1, where the difference of the two terms would cancel.
    const V raw = load<A>(x + y, 1, A{0});
    const A p = probability(y, 1, raw, inverse)[0];
    A g = scale * (own * (p - 1) + 2 * static_cast<A>(op.z_loss) * lse * p);
    if (uniform != 0) g += uniform * (weight_sum * p - weight_of(y));
    store_one(dx + y, static_cast<A>(g * dz<kCap>(raw)[0]));
  }

  template <bool kCap>
  void forward(const A* scale, A* loss, A* stats, T* dx, A* scratch, bool stream) const {
    const A inf = static_cast<A>(__builtin_inf());
    const bool smooth = op.label_smoothing != 0;
    V top = splat(-inf);
    for_vectors<A>(op.V, [&](int64_t v, int n) { top = max(top, pad(z<kCap>(load_n<A>(x + v, n, A{0})), n, -inf)); });
    A m = reduce_max<A>(top);
    // A row of -inf, or with +inf, has no softmax: everything that follows is NaN, as torch has it.
    if (m == -inf || m == inf) m = static_cast<A>(__builtin_nan(""));
    V sum{}, weighted{};
    for_vectors<A>(op.V, [&](int64_t v, int n) {
      const V below = z<kCap>(load_n<A>(x + v, n, A{0})) - m;
      const V p = exp(pad(below, n, -inf));
      sum += p;
      if (smooth) weighted += pad(below, n, A{0}) * (w ? load_n<A>(w + v, n, A{0}) : splat(A{1}));
      if (dx) n == L ? store(scratch + v, p) : store(scratch + v, p, n);
    });
    const A s = reduce_add<A>(sum), log_s = log_of(s);
    const A e = static_cast<A>(op.label_smoothing), below_y = z<kCap>(load<A>(x + y, 1, A{0}))[0] - m;
    A value = (1 - e) * weight_of(y) * (log_s - below_y);
    if (smooth) value += smoothing() * (weight_sum * log_s - reduce_add<A>(weighted));
    if (op.z_loss != 0) value += static_cast<A>(op.z_loss) * (m + log_s) * (m + log_s);
    *loss = value, stats[0] = m, stats[1] = s;
    if (dx)
      gradient<kCap>(*scale, stats, dx, stream,
                     [&](int64_t v, int n, V, A inverse) { return load_n<A>(scratch + v, n, A{0}) * inverse; });
  }

  static A log_of(A s) {
    if constexpr (sizeof(A) == 8) return ::log(s);
    return ::logf(s);
  }
  static V pad(V v, int n, A fill) {
    for (int i = n; i < L; ++i) v[i] = fill;
    return v;
  }
};

template <class T>
Row<T> row_of(const CrossEntropy& op, const void* x, int64_t y, double weight_sum) {
  return {op, static_cast<const T*>(x), static_cast<const T*>(op.weight), y, static_cast<Accum<T>>(weight_sum)};
}

void forward(const CrossEntropy& op, const void* x, int64_t y, double weight_sum, const void* scale, void* loss,
             void* stats, void* dx, void* scratch, bool stream) {
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    const Row<T> row = row_of<T>(op, x, y, weight_sum);
    auto run = [&](auto cap) {
      row.template forward<decltype(cap)::value>(static_cast<const A*>(scale), static_cast<A*>(loss),
                                                 static_cast<A*>(stats), static_cast<T*>(dx), static_cast<A*>(scratch),
                                                 stream);
    };
    op.softcap != 0 ? run(Bool<true>{}) : run(Bool<false>{});
  });
}

void backward(const CrossEntropy& op, const void* x, int64_t y, double weight_sum, const void* dloss, const void* stats,
              void* dx, bool stream) {
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    const Row<T> row = row_of<T>(op, x, y, weight_sum);
    const A* const st = static_cast<const A*>(stats);
    auto run = [&](auto cap) {
      constexpr bool kCap = decltype(cap)::value;
      row.template gradient<kCap>(
          *static_cast<const A*>(dloss), st, static_cast<T*>(dx), stream,
          [&](int64_t, int, Vec<A> raw, A inverse) { return exp(row.template z<kCap>(raw) - st[0]) * inverse; });
    };
    op.softcap != 0 ? run(Bool<true>{}) : run(Bool<false>{});
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy{&forward, &backward};

}  // namespace llmkern::cpu::LLMKERN_ISA
