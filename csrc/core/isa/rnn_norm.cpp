#include "core/rnn_norm.h"

#include "core/isa/rnn_cells.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

constexpr double kEpsilon = 1e-5;  // of torch's layer_norm

// The sum of f(i, n), which is 0 past a tail. Four at a time, because additions wait for each other.
template <class S, class F>
LLMKERN_INLINE S sum_of(int64_t size, const F& f) {
  constexpr int L = kLanes<S>;
  Vec<S> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= size; i += 4 * L)
    for (int v = 0; v < 4; ++v) sum[v] += f(i + v * L, L);
  for (int v = 0; i < size; i += L, ++v) sum[v] += f(i, size - i < L ? static_cast<int>(size - i) : L);
  return reduce_add<S>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// x (n) minus its mean times the reciprocal of its deviation, which is returned.
template <class S>
S normalise_row(S* x, int64_t size) {
  const S mean = sum_of<S>(size, [&](int64_t i, int n) { return load_n<S>(x + i, n); }) / static_cast<S>(size);
  const S squares = sum_of<S>(size, [&](int64_t i, int n) {
    const Vec<S> d = load_n<S>(x + i, n, mean) - mean;
    return d * d;
  });
  const S factor = 1 / sqrt(splat<S>(squares / static_cast<S>(size) + static_cast<S>(kEpsilon)))[0];
  for_vectors<S>(size, [&](int64_t i, int n) { store_n(x + i, (load_n<S>(x + i, n) - mean) * factor, n); });
  return factor;
}

// What the gradient of a row loses on its way through a norm: d becomes (d - mean - x slope) deviation, d the gradient
// of the normalised x.
template <class S>
struct Through {
  S mean, slope, deviation;
  Vec<S> operator()(Vec<S> d, Vec<S> x) const { return (d - mean - x * slope) * deviation; }
};

template <class S>
void normalise_rows(int64_t rows, int64_t n, MutableView x, void* deviation) {
  for (int64_t r = 0; r < rows; ++r) {
    const S factor = normalise_row(static_cast<S*>(x.data) + r * x.ld, n);
    if (deviation) static_cast<S*>(deviation)[r * x.ld] = factor;
  }
}

// f(at, unit) for the vectors of all units of a row.
template <class Cell, class S, class F>
LLMKERN_INLINE void each_unit(const Rnn& op, const RnnBlock& block, int64_t row, const F& f) {
  constexpr int L = kLanes<S>;
  int64_t u = 0;
  auto at = at_of<Cell, S, true>(op, block, row, 0, L);
  for (; u + L <= op.H; u += L, at.next_units(L)) f(at, u);
  if (u < op.H) f(at_of<Cell, S, false>(op, block, row, u, static_cast<int>(op.H - u)), u);
}

// --- forward ---

// The sums of a step as norms make them, for rnn_cells.h. An lstm's o and c are put down, until all of c is known.
template <class S, class P>
struct NormalisedSums {
  const P& at;
  const S *x, *h, *w_x, *w_h, *bias;
  S *o_, *c_;
  int64_t H;
  Vec<S> hidden(int g) const { return at.load(h + g * H + at.unit) * at.load(w_h + g * H + at.unit); }
  Vec<S> input(int g) const {
    const int64_t k = g * H + at.unit;
    return at.load(x + k) * at.load(w_x + k) + at.load(bias + k);
  }
  Vec<S> output(Vec<S> o, Vec<S> c) const {
    at.store(o_ + at.unit, o);
    at.store(c_ + at.unit, c);
    return o;
  }
};

template <class Cell, class T, class A>
void forward_of(const RnnForwardArgs& a, const RnnNormArgs& n, const RnnBlock& block) {
  using S = Accum<T>;
  const Rnn& op = *a.op;
  const int64_t H = op.H, size = Cell::kGates * H;
  const S* const w = static_cast<const S*>(n.norms);
  S *const o = static_cast<S*>(n.scratch), *const c = o + H;
  for (int row = 0; row < block.rows; ++row) {
    S* const hidden = static_cast<S*>(n.hidden) + row * n.hidden_ld;
    const S* const input = static_cast<const S*>(n.input) + row * n.input_ld;
    A* const next = static_cast<A*>(a.next) + (block.b + row) * a.next_ld;
    const S deviation = normalise_row(hidden, size);
    if (n.deviation) static_cast<S*>(n.deviation)[row * n.deviation_ld] = deviation;
    each_unit<Cell, S>(op, block, row, [&]<class P>(const P& at, int64_t u) {
      const NormalisedSums<S, P> x{at, input, hidden, w, w + size, static_cast<const S*>(n.bias), o, c, H};
      const Vec<S> h = Cell::template forward<T>(a, at, x);
      if constexpr (!__is_same(Cell, LstmCell)) put_h<T>(a, at, h, next + u);
    });
    if constexpr (__is_same(Cell, LstmCell)) {
      normalise_row(c, H);
      const S *const w_c = w + 2 * size, *const b_c = w_c + H;
      each_unit<Cell, S>(op, block, row, [&](const auto& at, int64_t u) {
        put_h<T>(a, at, at.load(o + u) * tanh(at.load(c + u) * at.load(w_c + u) + at.load(b_c + u)), next + u);
      });
    }
  }
}

// --- backward ---

// f(row, count, column): columns of dgates and the rows of weight_hh that they belong to.
template <class F>
LLMKERN_INLINE void each_hidden(const Rnn& op, const F& f) {
  const int64_t H = op.H;
  if (op.mode != RnnMode::gru) return f(int64_t{0}, gates_of(op.mode) * H, int64_t{0});
  f(2 * H, H, int64_t{0});
  f(int64_t{0}, 2 * H, H);
}

// What an lstm's backward needs of a normalised c, computed for all units before.
template <class S, class P>
struct NormalisedOutput {
  const P& at;
  const S *tanh_c_, *dcell;
  Vec<S> tanh_c(Vec<S>) const { return at.load(tanh_c_ + at.unit); }
  Vec<S> to_cell(Vec<S>) const { return at.load(dcell + at.unit); }
};

// tanh_c (H) = tanh of the normalised c, dcell (H) = what c gets through it; and the gradients of w_c and b_c.
template <class T, class S = Accum<T>>
void through_c(const RnnBackwardArgs& a, const RnnNormBackwardArgs& n, const RnnBlock& block, int64_t row, S* c,
               S* tanh_c, S* dcell) {
  using V = Vec<S>;
  const Rnn& op = *a.op;
  const int64_t H = op.H;
  const S *const w_c = static_cast<const S*>(n.norms) + 8 * H, *const b_c = w_c + H;
  each_unit<LstmCell, S>(op, block, row, [&](const auto& at, int64_t u) {
    at.store(c + u, LstmCell::cell_of<T>(a, at, Past{.h = 0, .c = row * a.c_stride + u}));
  });
  const S deviation = normalise_row(c, H);
  V sums[2] = {};
  each_unit<LstmCell, S>(op, block, row, [&](const auto& at, int64_t u) {
    const V x = at.load(c + u), w = at.load(w_c + u), y = tanh(x * w + at.load(b_c + u));
    const V o = at.load(static_cast<const T*>(a.gates) + at.gates + 3 * H);
    V dbefore;
    const V dout = where_within(o * y, static_cast<S>(op.clip), take_dh<T>(a, at, dbefore));
    const V d = dout * o * (1 - y * y);
    S* const to = static_cast<S*>(n.dnorm_c) + at.b * 2 * H + u;
    at.store(to, at.load(to) + d * x);
    at.store(to + H, at.load(to + H) + d);
    at.store(tanh_c + u, y);
    at.store(dcell + u, d * w);
    sums[0] += d * w;
    sums[1] += d * w * x;
  });
  const S size = static_cast<S>(H);
  const Through<S> through{reduce_add<S>(sums[0]) / size, reduce_add<S>(sums[1]) / size, deviation};
  for_vectors<S>(
      H, [&](int64_t i, int k) { store_n(dcell + i, through(load_n<S>(dcell + i, k), load_n<S>(c + i, k)), k); });
}

// dhidden (G H) from dgates (D) of one token.
template <class A, class S>
void through_hidden(const Rnn& op, const S* dgates, const S* normed, const S* w, A* dhidden) {
  const int64_t size = gates_of(op.mode) * op.H;
  const S *const x = normed + size, deviation = normed[2 * size + 1];
  w += size;
  S sums[2] = {};
  each_hidden(op, [&](int64_t row, int64_t count, int64_t column) {
    const auto d = [&](int64_t i, int k) { return load_n<S>(dgates + column + i, k) * load_n<S>(w + row + i, k); };
    sums[0] += sum_of<S>(count, d);
    sums[1] += sum_of<S>(count, [&](int64_t i, int k) { return d(i, k) * load_n<S>(x + row + i, k); });
  });
  const Through<S> through{sums[0] / static_cast<S>(size), sums[1] / static_cast<S>(size), deviation};
  each_hidden(op, [&](int64_t row, int64_t count, int64_t column) {
    for_vectors<S>(count, [&](int64_t i, int k) {
      const Vec<S> d = load_n<S>(dgates + column + i, k) * load_n<S>(w + row + i, k);
      store_n(dhidden + row + i, through(d, load_n<S>(x + row + i, k)), k);
    });
  });
}

template <class Cell, class T, class A>
void backward_of(const RnnBackwardArgs& a, const RnnNormBackwardArgs& n, const RnnBlock& block) {
  using S = Accum<T>;
  const Rnn& op = *a.op;
  const int64_t H = op.H, D = dgates_of(op);
  S *const dgates = static_cast<S*>(n.scratch), *const c = dgates + D, *const tanh_c = c + H, *const dcell = tanh_c + H;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t token = block.token + row * block.stride;
    if constexpr (__is_same(Cell, LstmCell)) through_c<T>(a, n, block, row, c, tanh_c, dcell);
    each_unit<Cell, S>(op, block, row, [&]<class P>(const P& at, int64_t u) {
      Vec<S> dbefore;
      const Vec<S> dout = take_dh<T>(a, at, dbefore);
      dbefore += Cell::template backward<T>(a, at, Past{.h = row * a.h_stride + u, .c = row * a.c_stride + u}, dout,
                                            dgates + u, NormalisedOutput<S, P>{at, tanh_c, dcell});
      at.store(static_cast<S*>(a.dh) + at.state, dbefore);
    });
    A* const to = static_cast<A*>(a.dgates) + token * D;
    for_vectors<S>(dgates_used(op), [&](int64_t i, int k) { store_n(to + i, load_n<S>(dgates + i, k), k); });
    through_hidden(op, dgates, static_cast<const S*>(n.normed) + token * normed_of(op), static_cast<const S*>(n.norms),
                   static_cast<A*>(n.dhidden) + token * dhidden_of(op));
  }
}

template <class A, class S>
void input_of(const Rnn& op, int64_t rows, A* dgates, const S* normed, const S* w, S* sums) {
  const int64_t H = op.H, size = gates_of(op.mode) * H, D = dgates_of(op);
  const auto add = [&](S* to, Vec<S> x, int k) { store_n(to, load_n<S>(to, k) + x, k); };
  for (int64_t r = 0; r < rows; ++r, dgates += D, normed += normed_of(op)) {
    if (sums) {
      each_hidden(op, [&](int64_t row, int64_t count, int64_t column) {
        for_vectors<S>(count, [&](int64_t i, int k) {
          const Vec<S> d = load_n<S>(dgates + column + i, k);
          add(sums + size + row + i, d * load_n<S>(normed + size + row + i, k), k);
        });
      });
      for_vectors<S>(dgates_used(op), [&](int64_t i, int k) { add(sums + 2 * size + i, load_n<S>(dgates + i, k), k); });
    }
    A* const own = dgates + (op.mode == RnnMode::gru ? H : 0);
    S total[2] = {};
    total[0] = sum_of<S>(size, [&](int64_t i, int k) { return load_n<S>(own + i, k) * load_n<S>(w + i, k); });
    total[1] = sum_of<S>(size, [&](int64_t i, int k) {
      const Vec<S> d = load_n<S>(own + i, k) * load_n<S>(normed + i, k);
      if (sums) add(sums + i, d, k);
      return d * load_n<S>(w + i, k);
    });
    const Through<S> through{total[0] / static_cast<S>(size), total[1] / static_cast<S>(size), normed[2 * size]};
    for_vectors<S>(size, [&](int64_t i, int k) {
      store_n(own + i, through(load_n<S>(own + i, k) * load_n<S>(w + i, k), load_n<S>(normed + i, k)), k);
    });
  }
}

// --- by types ---

void normalise(int64_t rows, int64_t n, MutableView x, void* deviation) {
  if (x.dtype == DType::f64)
    normalise_rows<double>(rows, n, x, deviation);
  else
    normalise_rows<float>(rows, n, x, deviation);
}

void forward(const RnnForwardArgs& args, const RnnNormArgs& norm, const RnnBlock& block) {
  visit_mode(args.op->mode, [&](auto cell) {
    visit_types(args.op->dtype, args.operand,
                [&](auto t, auto a) { forward_of<decltype(cell), decltype(t), decltype(a)>(args, norm, block); });
  });
}

void backward(const RnnBackwardArgs& args, const RnnNormBackwardArgs& norm, const RnnBlock& block) {
  visit_mode(args.op->mode, [&](auto cell) {
    visit_types(args.op->dtype, args.operand,
                [&](auto t, auto a) { backward_of<decltype(cell), decltype(t), decltype(a)>(args, norm, block); });
  });
}

void input(const Rnn& op, DType operand, int64_t rows, void* dgates, const void* normed, const void* norms,
           void* sums) {
  visit_types(op.dtype, operand, [&](auto t, auto a) {
    using S = Accum<decltype(t)>;
    input_of(op, rows, static_cast<decltype(a)*>(dgates), static_cast<const S*>(normed), static_cast<const S*>(norms),
             static_cast<S*>(sums));
  });
}

}  // namespace

extern const RnnNormKernels rnn_norm{
    .normalise = &normalise, .forward = &forward, .backward = &backward, .input = &input};

}  // namespace llmkern::cpu::LLMKERN_ISA
