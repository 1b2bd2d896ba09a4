#include "core/fused_embedding.h"

#include "core/isa/random.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// What one token's row is made of, vector by vector. All that the loops need is copied here: through a reference it
// would be read again after every store.
template <class T>
class TokenRow {
 public:
  using A = Accum<T>;

  TokenRow(const FusedEmbedding& op, int64_t n, const FusedRows& rows)
      : token_(static_cast<const T*>(rows.at[0])),
        position_(static_cast<const T*>(rows.at[1])),
        type_(static_cast<const T*>(rows.at[2])),
        weight_(static_cast<const T*>(op.norm_weight)),
        bias_(static_cast<const T*>(op.norm_bias)),
        next_(static_cast<const T*>(rows.next)),
        first_(static_cast<uint64_t>(n * op.D)),
        seed_(op.seed),
        p_(op.p),
        scale_(static_cast<A>(op.scale)),
        keep_(op.p < 1 ? static_cast<A>(1 / (1 - op.p)) : A{}) {}

  // Fetches the same place of the next token's row: rows lie anywhere.
  Vec<A> sum(int64_t d, int n) const {
    __builtin_prefetch(next_ + d);
    Vec<A> s = load_n<A>(token_ + d, n) * scale_;
    if (position_) s += load_n<A>(position_ + d, n);
    if (type_) s += load_n<A>(type_ + d, n);
    return s;
  }
  // A product with the mask, as torch's: what is dropped and not finite is NaN.
  Vec<A> dropped(Vec<A> v, int64_t d) const {
    if (p_ == 0) return v;
    return v * (drawn<A>(p_, seed_, first_ + static_cast<uint64_t>(d), 0) != 0 ? Vec<A>{} : splat(keep_));
  }
  Vec<A> weight(int64_t d, int n) const { return weight_ ? load_n<A>(weight_ + d, n) : splat(A{1}); }
  Vec<A> bias(int64_t d, int n) const { return bias_ ? load_n<A>(bias_ + d, n) : Vec<A>{}; }

 private:
  const T *token_, *position_, *type_, *weight_, *bias_, *next_;
  uint64_t first_, seed_;
  double p_;
  A scale_, keep_;
};

template <class T>
void forward(const FusedEmbedding& op, int64_t n, const FusedRows& rows, T* out, Accum<T>* stats, Accum<T>* s) {
  using A = Accum<T>;
  const TokenRow<T> row(op, n, rows);
  const int64_t D = op.D;
  if (op.norm == Norm::none)
    return for_vectors<A>(D, [&](int64_t d, int lanes) { store_n(out + d, row.dropped(row.sum(d, lanes), d), lanes); });
  const A count = static_cast<A>(D);
  Vec<A> total{}, squares{};
  for_vectors<A>(D, [&](int64_t d, int lanes) {
    const Vec<A> v = row.sum(d, lanes);
    total += v;
    store_n(s + d, v, lanes);
  });
  const A mean = op.norm == Norm::layer ? reduce_add<A>(total) / count : A{};
  for_vectors<A>(D, [&](int64_t d, int lanes) {
    const Vec<A> v = filled<A>(load_n<A>(s + d, lanes) - mean, lanes);
    squares += v * v;
  });
  const A rstd = 1 / sqrt(splat(reduce_add<A>(squares) / count + static_cast<A>(op.eps)))[0];
  stats[0] = mean;
  stats[1] = rstd;
  for_vectors<A>(D, [&](int64_t d, int lanes) {
    const Vec<A> v = (load_n<A>(s + d, lanes) - mean) * rstd * row.weight(d, lanes) + row.bias(d, lanes);
    store_n(out + d, row.dropped(v, d), lanes);
  });
}

// With x the normalised row and g the gradient at it: dsum = (g - mean(g) - x mean(g x)) / deviation; rms has no
// mean(g).
template <class T>
void backward(const FusedEmbedding& op, int64_t n, const FusedRows& rows, const T* dout, const Accum<T>* stats, T* dsum,
              Accum<T>* sums, Accum<T>* x) {
  using A = Accum<T>;
  const TokenRow<T> row(op, n, rows);
  const int64_t D = op.D;
  if (op.norm == Norm::none)
    return for_vectors<A>(
        D, [&](int64_t d, int lanes) { store_n(dsum + d, row.dropped(load_n<A>(dout + d, lanes), d), lanes); });
  const A count = static_cast<A>(D), mean = stats[0], rstd = stats[1];
  A* const g = x + D;
  Vec<A> total{}, product{};
  for_vectors<A>(D, [&](int64_t d, int lanes) {
    const Vec<A> normal = (row.sum(d, lanes) - mean) * rstd, dy = row.dropped(load_n<A>(dout + d, lanes), d);
    if (sums) {
      store_n(sums + d, load_n<A>(sums + d, lanes) + dy * normal, lanes);
      store_n(sums + D + d, load_n<A>(sums + D + d, lanes) + dy, lanes);
    }
    const Vec<A> dx = dy * row.weight(d, lanes);
    total += dx;
    product += dx * normal;
    store_n(x + d, normal, lanes);
    store_n(g + d, dx, lanes);
  });
  if (!dsum) return;
  const A shift = op.norm == Norm::layer ? reduce_add<A>(total) / count : A{}, slope = reduce_add<A>(product) / count;
  for_vectors<A>(D, [&](int64_t d, int lanes) {
    const Vec<A> v = load_n<A>(g + d, lanes) - shift - load_n<A>(x + d, lanes) * slope;
    store_n(dsum + d, v * rstd, lanes);
  });
}

void forward_any(const FusedEmbedding& op, int64_t n, const FusedRows& rows, void* out, void* stats, void* scratch) {
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    forward(op, n, rows, static_cast<T*>(out), static_cast<A*>(stats), static_cast<A*>(scratch));
  });
}

void backward_any(const FusedEmbedding& op, int64_t n, const FusedRows& rows, const void* dout, const void* stats,
                  void* dsum, void* sums, void* scratch) {
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    backward(op, n, rows, static_cast<const T*>(dout), static_cast<const A*>(stats), static_cast<T*>(dsum),
             static_cast<A*>(sums), static_cast<A*>(scratch));
  });
}

void add_up(const void* sums, int64_t count, int64_t stride, int64_t D, DType dtype, void* out) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    for_vectors<A>(D, [&](int64_t d, int lanes) {
      Vec<A> total{};
      for (int64_t i = 0; i < count; ++i) total += load_n<A>(static_cast<const A*>(sums) + i * stride + d, lanes);
      store_n(static_cast<T*>(out) + d, total, lanes);
    });
  });
}

}  // namespace

extern const FusedEmbeddingKernels fused_embedding{
    .forward = &forward_any, .backward = &backward_any, .add_up = &add_up};

}  // namespace llmkern::cpu::LLMKERN_ISA
