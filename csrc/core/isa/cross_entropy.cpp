#include "core/cross_entropy.h"

#include "core/isa/functions.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// The logit as the softmax sees it, and its derivative by the raw one.
template <class A, bool kCap>
struct Logit {
  A scale, cap;

  explicit Logit(const CrossEntropy& op) : scale(static_cast<A>(op.logit_scale)), cap(static_cast<A>(op.softcap)) {}
  Vec<A> z(Vec<A> raw) const {
    if constexpr (!kCap) return raw * scale;
    return cap * tanh(raw * (scale / cap));
  }
  Vec<A> dz(Vec<A> raw) const {
    if constexpr (!kCap) return splat(scale);
    const Vec<A> t = tanh(raw * (scale / cap));
    return scale * (1 - t * t);
  }
};

// 0 * -inf is NaN; where e is 0 this keeps e (z - m) at 0. exp of it is 0 in fp64 too.
template <class A>
inline Vec<A> bounded(Vec<A> below) {
  return max(below, splat(A{-800}));
}

// --- a block ---

// Writes a block's gradient, vector by vector. kMore: the logits are needed beside their exponentials, for the cap or
// the entropy.
template <class T, class X, bool kCap, bool kMore>
class Gradient {
 public:
  using A = Accum<T>;

  Gradient(const CrossEntropy& op, const CrossEntropyBlockGradient& block)
      : logit_(op),
        x_(static_cast<const T*>(block.x)),
        u_(static_cast<const A*>(block.u)),
        e_(static_cast<const A*>(block.e)),
        dx_(static_cast<X*>(block.dx)),
        p_(static_cast<A>(block.k.p)),
        softmax_(static_cast<A>(block.k.softmax)),
        entropy_(static_cast<A>(block.k.entropy)),
        m_(static_cast<A>(block.k.m)),
        loss_(static_cast<A>(block.k.loss)),
        uniform_(static_cast<A>(block.k.loss * block.k.uniform)),
        stream_(block.stream && reinterpret_cast<uintptr_t>(dx_) % kVectorBytes == 0 && sizeof(X) == sizeof(A)),
        y_(block.y) {
    // The target's own term: p - 1 is exact near 1, where the difference of the two terms would cancel. Taken before
    // dx, which may lie where x does.
    if (y_ < 0) return;
    const A probability = e_[y_] * p_, own = static_cast<A>(block.k.own);
    own_ = value(y_, 1, static_cast<A>(block.k.softmax - block.k.own))[0] +
           own * (probability - 1) * logit_.dz(load<A>(x_ + y_, 1, A{0}))[0];
  }
  [[gnu::always_inline]] void operator()(int64_t v, int lanes) const {
    const Vec<A> g = value(v, lanes, softmax_);
    if (lanes < kLanes<A>)
      store(dx_ + v, g, lanes);
    else if (stream_)
      store_streaming(dx_ + v, g);
    else
      store(dx_ + v, g);
  }
  void finish() const {
    if (y_ >= 0) store_one(dx_ + y_, own_);
  }

 private:
  [[gnu::always_inline]] Vec<A> value(int64_t v, int lanes, A coefficient) const {
    Vec<A> g = load_n<A>(e_ + v, lanes) * p_;
    if constexpr (kMore) {
      const Vec<A> raw = load_n<A>(x_ + v, lanes);
      g *= coefficient - entropy_ * bounded<A>(logit_.z(raw) - m_);
      g -= u_ ? loss_ * load_n<A>(u_ + v, lanes) : splat(uniform_);
      return g * logit_.dz(raw);
    } else {
      g = g * coefficient - (u_ ? loss_ * load_n<A>(u_ + v, lanes) : splat(uniform_));
      return g * logit_.scale;
    }
  }

  Logit<A, kCap> logit_;
  const T* x_;
  const A *u_, *e_;
  X* dx_;
  A p_, softmax_, entropy_, m_, loss_, uniform_, own_{};
  bool stream_;
  int64_t y_;
};

struct Nothing {
  void operator()(int64_t, int) const {}
};

// meanwhile(v, lanes) is called between the exponentials.
template <class T, bool kCap, bool kMore, class F>
void reduce_block(const CrossEntropy& op, const T* x, const Accum<T>* u, double uniform, int64_t n, bool entropy,
                  Accum<T>* e, CrossEntropyPart* part, const F& meanwhile) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  const Logit<A, kCap> logit(op);
  const A inf = static_cast<A>(__builtin_inf());
  // Four chains: a maximum takes longer than a load.
  Vec<A> top[4] = {splat(-inf), splat(-inf), splat(-inf), splat(-inf)};
  int64_t v = 0;
  for (; v + 4 * L <= n; v += 4 * L)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = max(top[i], logit.z(load<A>(x + v + i * L)));
  for_vectors<A>(n - v,
                 [&](int64_t i, int m) { top[0] = max(top[0], filled(logit.z(load_n<A>(x + v + i, m)), m, -inf)); });
  const A most = reduce_max<A>(max(max(top[0], top[1]), max(top[2], top[3]))), base = most == -inf ? A{0} : most;
  Vec<A> sum{}, total{}, weighted{}, moment{};
  for_vectors<A>(n, [&](int64_t i, int m) {
    const Vec<A> below = logit.z(load_n<A>(x + i, m)) - base;
    const Vec<A> p = exp_negative(filled(below, m, -inf));
    sum += p;
    if (e) store_n(e + i, p, m);
    // The next block, whose maximum is looked for at once, at the speed of memory.
    __builtin_prefetch(x + i + kCrossEntropyBlock);
    meanwhile(i, m);
    if constexpr (kMore) {
      const Vec<A> known = filled(below, m, A{0});
      if (u) {
        const Vec<A> share = load_n<A>(u + i, m);
        total += share;
        weighted += share * known;
      } else {
        weighted += known;
      }
      if (entropy) moment += p * bounded<A>(below);
    }
  });
  *part = {most,
           base,
           static_cast<double>(reduce_add<A>(sum)),
           u ? static_cast<double>(reduce_add<A>(total)) : uniform * static_cast<double>(n),
           static_cast<double>(reduce_add<A>(weighted)) * (u ? 1 : uniform),
           static_cast<double>(reduce_add<A>(moment))};
}

template <class T, class D>
void target_gradient(const CrossEntropy& op, const CrossEntropyFactors& k, const T* x, const Accum<T>* w, int64_t n,
                     D* dt) {
  using A = Accum<T>;
  const A factor = static_cast<A>(k.loss * k.keep), lse = static_cast<A>(k.log_sum), m = static_cast<A>(k.m);
  const auto run = [&](auto logit) {
    for_vectors<A>(n, [&](int64_t v, int lanes) {
      Vec<A> g = factor * (lse - (logit.z(load_n<A>(x + v, lanes)) - m));
      if (w) g *= load_n<A>(w + v, lanes);
      store_n(dt + v, g, lanes);
    });
  };
  op.softcap != 0 ? run(Logit<A, true>(op)) : run(Logit<A, false>(op));
}

// --- the table's functions: dtypes and options become types ---

template <class F>
void with_cap(const CrossEntropy& op, const F& f) {
  op.softcap != 0 ? f(Bool<true>{}) : f(Bool<false>{});
}

void targets(const void* t, DType dtype, const void* w, double keep, double uniform, int64_t n, void* u) {
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accum<T>;
    const T* const from = static_cast<const T*>(t);
    const A *const weights = static_cast<const A*>(w), share = static_cast<A>(keep), rest = static_cast<A>(uniform);
    A* const to = static_cast<A*>(u);
    for_vectors<A>(n, [&](int64_t v, int lanes) {
      Vec<A> value = from ? load_n<A>(from + v, lanes) * share + rest : splat(rest);
      if (weights) value *= load_n<A>(weights + v, lanes);
      store_n(to + v, value, lanes);
    });
  });
}

template <class T, class X>
void write_gradient(const CrossEntropy& op, const CrossEntropyBlockGradient& block) {
  const auto run = [&](const auto& gradient) {
    for_vectors<Accum<T>>(block.n, gradient);
    gradient.finish();
  };
  if (op.softcap != 0)
    run(Gradient<T, X, true, true>(op, block));
  else if (block.k.entropy != 0.0)
    run(Gradient<T, X, false, true>(op, block));
  else
    run(Gradient<T, X, false, false>(op, block));
}

// Calls f with the type of dx: that of the logits T, or bf16 for fp32.
template <class T, class F>
void with_dx(const CrossEntropy& op, const CrossEntropyBlockGradient& block, const F& f) {
  if (block.dx_dtype == op.dtype) return f(T{});
  if constexpr (__is_same(T, float)) f(bf16{});
}

void gradient(const CrossEntropy& op, const CrossEntropyBlockGradient& block) {
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    // Before dx, which may lie where x does.
    if (block.dt)
      visit(op.target_dtype, [&](auto d) {
        using D = decltype(d);
        if constexpr (sizeof(Accum<D>) == sizeof(Accum<T>))
          target_gradient(op, block.k, static_cast<const T*>(block.x), static_cast<const Accum<T>*>(block.w), block.n,
                          static_cast<D*>(block.dt));
      });
    if (block.dx) with_dx<T>(op, block, [&](auto x) { write_gradient<T, decltype(x)>(op, block); });
  });
}

void reduce(const CrossEntropy& op, const void* x, const void* u, double uniform, int64_t n, bool entropy, void* e,
            CrossEntropyPart* part, const CrossEntropyBlockGradient* meanwhile) {
  const bool more = u || uniform != 0 || entropy;
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    const auto run = [&](auto cap, auto needs_more, const auto& between) {
      reduce_block<T, decltype(cap)::value, decltype(needs_more)::value>(op, static_cast<const T*>(x),
                                                                         static_cast<const A*>(u), uniform, n, entropy,
                                                                         static_cast<A*>(e), part, between);
    };
    // The usual case; in others arithmetic is what takes the time.
    if (meanwhile && meanwhile->dx && !meanwhile->dt && !more && op.softcap == 0 && meanwhile->k.entropy == 0.0)
      return with_dx<T>(op, *meanwhile, [&](auto dx) {
        const Gradient<T, decltype(dx), false, false> between(op, *meanwhile);
        run(Bool<false>{}, Bool<false>{}, between);
        between.finish();
      });
    with_cap(op, [&](auto cap) { more ? run(cap, Bool<true>{}, Nothing{}) : run(cap, Bool<false>{}, Nothing{}); });
    if (meanwhile) gradient(op, *meanwhile);
  });
}

int64_t find(const CrossEntropy& op, const void* x, int64_t n, double value) {
  int64_t at = -1;
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    const A wanted = static_cast<A>(value);
    with_cap(op, [&](auto cap) {
      const Logit<A, decltype(cap)::value> logit(op);
      for (int64_t v = 0; v < n && at < 0; v += kLanes<A>) {
        const int lanes = n - v < kLanes<A> ? static_cast<int>(n - v) : kLanes<A>;
        const Vec<A> z = logit.z(load_n<A>(static_cast<const T*>(x) + v, lanes));
        for (int i = 0; i < lanes && at < 0; ++i)
          if (z[i] == wanted || z[i] != z[i]) at = v + i;
      }
    });
  });
  return at;
}

double logit(const CrossEntropy& op, const void* x) {
  double z = 0;
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    with_cap(
        op, [&](auto cap) { z = Logit<A, decltype(cap)::value>(op).z(load<A>(static_cast<const T*>(x), 1, A{0}))[0]; });
  });
  return z;
}

template <class From, class To>
void transpose_as(const From* from, int64_t ld, int64_t rows, int64_t cols, To* to, int64_t to_ld) {
  // Squares of a cache line: each is read and written once.
  constexpr int64_t S = 16;
  for (int64_t r = 0; r < rows; r += S)
    for (int64_t c = 0; c < cols; c += S)
      for (int64_t i = r; i < rows && i < r + S; ++i)
        for (int64_t j = c; j < cols && j < c + S; ++j) {
          if constexpr (__is_same(From, To))
            to[j * to_ld + i] = from[i * ld + j];
          else
            store_one(to + j * to_ld + i, load_one(from + i * ld + j));
        }
}

void transpose(View from, int64_t rows, int64_t cols, MutableView to) {
  visit(from.dtype, [&](auto f) {
    visit(to.dtype, [&](auto t) {
      using From = decltype(f);
      using To = decltype(t);
      if constexpr (sizeof(Accum<From>) == sizeof(Accum<To>))
        transpose_as(static_cast<const From*>(from.data), from.ld, rows, cols, static_cast<To*>(to.data), to.ld);
    });
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy{.targets = &targets,
                                               .reduce = &reduce,
                                               .gradient = &gradient,
                                               .find = &find,
                                               .logit = &logit,
                                               .transpose = &transpose};

}  // namespace llmkern::cpu::LLMKERN_ISA
