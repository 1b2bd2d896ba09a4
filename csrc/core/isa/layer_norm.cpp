#include "core/layer_norm.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// Sums of K terms, of which f(d, n, sums) adds those of n elements from d on, zeros past them. Four sets of sums hide
// the latency of the addition.
template <class A, int K, class F>
inline void sum_up(int64_t D, A* result, const F& f) {
  constexpr int L = kLanes<A>, kSets = 4;
  Vec<A> sums[kSets][K]{};
  int64_t d = 0;
  for (; d + kSets * L <= D; d += kSets * L)
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) f(d + s * L, L, sums[s]);
  for (; d < D; d += L) f(d, D - d < L ? static_cast<int>(D - d) : L, sums[0]);
  for (int k = 0; k < K; ++k) result[k] = reduce_add<A>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
}

// Where rows go: past the caches, if that is wanted and they lie so.
template <class T>
class Output {
 public:
  Output(void* p, int64_t D, bool stream)
      : p_(static_cast<T*>(p)),
        stream_(stream && reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && D * sizeof(T) % kVectorBytes == 0) {}
  explicit operator bool() const { return p_; }
  void put(int64_t i, Vec<Accum<T>> v, int n) const {
    if (n < kLanes<Accum<T>>)
      store(p_ + i, v, n);
    else if (stream_)
      store_streaming(p_ + i, v);
    else
      store(p_ + i, v);
  }

 private:
  T* const p_;
  const bool stream_;
};

template <class T, bool kWeight, bool kBias>
void forward(const LayerNorm& op, int64_t begin, int64_t end, const Output<T>& y, Accum<T>* stats) {
  using A = Accum<T>;
  const A* const weight = static_cast<const A*>(op.weight);
  const A* const bias = static_cast<const A*>(op.bias);
  const int64_t D = op.D;
  const A count = static_cast<A>(D), eps = static_cast<A>(op.eps);
  for (int64_t n = begin; n < end; ++n) {
    const T* const x = static_cast<const T*>(op.x) + n * D;
    A mean{}, squares;
    if (!op.rms) {
      sum_up<A, 1>(D, &mean, [&](int64_t d, int lanes, Vec<A>* sum) { sum[0] += load_n<A>(x + d, lanes); });
      mean /= count;
    }
    sum_up<A, 1>(D, &squares, [&](int64_t d, int lanes, Vec<A>* sum) {
      const Vec<A> v = load_n<A>(x + d, lanes, mean) - mean;
      sum[0] += v * v;
    });
    const A rstd = 1 / sqrt(splat(squares / count + eps))[0];
    stats[2 * n] = mean;
    stats[2 * n + 1] = rstd;
    for_vectors<A>(D, [&](int64_t d, int lanes) {
      Vec<A> v = (load_n<A>(x + d, lanes) - mean) * rstd;
      if constexpr (kWeight) v = v * load_n<A>(weight + d, lanes);
      if constexpr (kBias) v = v + load_n<A>(bias + d, lanes);
      y.put(n * D + d, v, lanes);
    });
  }
}

// With x the normalised row and g = dy * weight: dx = (g - mean(g) - x mean(g x)) / deviation; rms has no mean(g). The
// second look at a few rows also sums what they add to the gradients of weight and bias, so that these are read and
// written once for all of them.
template <class T, bool kWeight>
class Backward {
 public:
  using A = Accum<T>;

  Backward(const LayerNorm& op, const void* dy, const void* stats, const LayerNormGradients& to, bool stream)
      : x_(static_cast<const T*>(op.x)),
        dy_(static_cast<const T*>(dy)),
        weight_(static_cast<const A*>(op.weight)),
        stats_(static_cast<const A*>(stats)),
        D_(op.D),
        rms_(op.rms),
        dx_(to.x, op.D, stream),
        dweight_(static_cast<A*>(to.weight)),
        dbias_(static_cast<A*>(to.bias)) {}

  void run(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; n += kRows) rows(n, end - n < kRows ? static_cast<int>(end - n) : kRows);
  }

 private:
  static constexpr int kRows = 4;

  Vec<A> normal(int64_t n, int64_t d, int lanes) const {
    return (load_n<A>(x_ + n * D_ + d, lanes) - stats_[2 * n]) * stats_[2 * n + 1];
  }
  Vec<A> weighted(Vec<A> dy, int64_t d, int lanes) const { return kWeight ? dy * load_n<A>(weight_ + d, lanes) : dy; }

  void rows(int64_t n, int count) const {
    A means[kRows][2];
    for (int r = 0; dx_ && r < count; ++r) {
      sum_up<A, 2>(D_, means[r], [&](int64_t d, int lanes, Vec<A>* sums) {
        const Vec<A> g = weighted(load_n<A>(dy_ + (n + r) * D_ + d, lanes), d, lanes);
        sums[0] += g;
        sums[1] += g * normal(n + r, d, lanes);
      });
      means[r][0] = rms_ ? A{} : means[r][0] / static_cast<A>(D_);
      means[r][1] /= static_cast<A>(D_);
    }
    for_vectors<A>(D_, [&](int64_t d, int lanes) {
      Vec<A> dweight{}, dbias{};
      for (int r = 0; r < count; ++r) {
        const Vec<A> x = normal(n + r, d, lanes), dy = load_n<A>(dy_ + (n + r) * D_ + d, lanes);
        dweight += dy * x;
        dbias += dy;
        if (!dx_) continue;
        const Vec<A> dx = weighted(dy, d, lanes) - means[r][0] - x * means[r][1];
        dx_.put((n + r) * D_ + d, dx * stats_[2 * (n + r) + 1], lanes);
      }
      add(dweight_, d, dweight, lanes);
      add(dbias_, d, dbias, lanes);
    });
  }
  static void add(A* sums, int64_t d, Vec<A> v, int lanes) {
    if (!sums) return;
    store_n(sums + d, load_n<A>(sums + d, lanes) + v, lanes);
  }

  const T *x_, *dy_;
  const A *weight_, *stats_;
  int64_t D_;
  bool rms_;
  Output<T> dx_;
  A *dweight_, *dbias_;
};

void forward_any(const LayerNorm& op, int64_t begin, int64_t end, void* y, void* stats, bool stream) {
  visit(op.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto weight, auto bias) {
      forward<T, weight.value, bias.value>(op, begin, end, {y, op.D, stream}, static_cast<Accum<T>*>(stats));
    };
    if (op.weight && op.bias)
      run(Bool<true>{}, Bool<true>{});
    else if (op.weight)
      run(Bool<true>{}, Bool<false>{});
    else if (op.bias)
      run(Bool<false>{}, Bool<true>{});
    else
      run(Bool<false>{}, Bool<false>{});
  });
}

void backward_any(const LayerNorm& op, int64_t begin, int64_t end, const void* dy, const void* stats,
                  const LayerNormGradients& to, bool stream) {
  visit(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.weight)
      Backward<T, true>(op, dy, stats, to, stream).run(begin, end);
    else
      Backward<T, false>(op, dy, stats, to, stream).run(begin, end);
  });
}

void widen(const void* v, DType dtype, int64_t n, void* out) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accum<T>;
    const Output<A> to(out, n, false);
    for_vectors<A>(n, [&](int64_t d, int lanes) { to.put(d, load_n<A>(static_cast<const T*>(v) + d, lanes), lanes); });
  });
}

void add_up(const void* parts, int64_t count, int64_t stride, int64_t n, DType dtype, void* out) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accum<T>;
    const Output<T> to(out, n, false);
    for_vectors<A>(n, [&](int64_t d, int lanes) {
      Vec<A> sum{};
      for (int64_t i = 0; i < count; ++i) sum += load_n<A>(static_cast<const A*>(parts) + i * stride + d, lanes);
      to.put(d, sum, lanes);
    });
  });
}

}  // namespace

extern const LayerNormKernels layer_norm{
    .forward = &forward_any, .backward = &backward_any, .widen = &widen, .add_up = &add_up};

}  // namespace llmkern::cpu::LLMKERN_ISA
