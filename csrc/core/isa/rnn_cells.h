// The cells: what one step makes of the sums of its products, forward and backward, for a few units of a few sequences.
//
// About 60 instructions for a vector of units of an lstm forward, 40 backward, where the products take 8 H / lanes. A
// cell is one struct: `forward` takes the sums of the gates and the states and returns the new ones, `backward` the
// gradients. What is optional costs a branch that is always taken the same way. Where the sums come from, and what an
// lstm's h is made of beside o, is a parameter `x`: plain here, normalised in rnn_norm.cpp.
#pragma once
#include "core/isa/functions.h"
#include "core/isa/random.h"
#include "core/isa/simd.h"
#include "core/rnn.h"

#define LLMKERN_INLINE inline __attribute__((always_inline))

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// One vector of units of one sequence: how many, where they lie in every array of a step. What the cells do is inlined
// once for whole vectors, whose length the compiler knows, and once for tails.
template <class S, bool kWhole>
struct At {
  const Rnn& op;
  int64_t unit;          // in (H)
  int64_t state, c;      // in (B, H), (B, C)
  int64_t token, cells;  // in (tokens, H), (tokens, C)
  int64_t gates;         // in what is saved of them
  int64_t step, b;
  int tail;

  template <class T>
  Vec<S> load(const T* p) const {
    if constexpr (kWhole)
      return LLMKERN_ISA::load<S>(p);
    else
      return LLMKERN_ISA::load<S>(p, tail, S{0});
  }
  template <class T>
  void store(T* p, Vec<S> v) const {
    if constexpr (kWhole)
      LLMKERN_ISA::store(p, v);
    else
      LLMKERN_ISA::store(p, v, tail);
  }
  // The vectors of several gates or states, `apart` elements from one to the next.
  template <class T, int N>
  void store_apart(T* p, int64_t apart, const Vec<S> (&v)[N]) const {
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) store(p + k * apart, v[k]);
  }
  // Of the elements of a state that zoneout draws.
  uint64_t drawn() const { return static_cast<uint64_t>(step * op.B + b) * op.H + unit; }
  void next_units(int n) {
    unit += n;
    state += n;
    c += n;
    token += n;
    cells += n;
    gates += n;
  }
};

// The vector of a block's units from `unit` on, of sequence `row` of the block.
template <class Cell, class S, bool kWhole>
inline At<S, kWhole> at_of(const Rnn& op, const RnnBlock& block, int64_t row, int64_t unit, int tail) {
  const int64_t H = op.H, C = cells_of(op), b = block.b + row, token = block.token + row * block.stride;
  return {
      op,         unit, b * H + unit, b * C + unit, token * H + unit, token * C + unit, token * Cell::kSaved * H + unit,
      block.step, b,    tail};
}

// Where the states before a backward's step lie, from those of the first sequence and unit of its block.
struct Past {
  int64_t h, c;
};

// Of elements [index, index + lanes) of a state under zoneout, how much is kept: drawn in training, 0 or 1, else
// the same of all. `salt` tells h from c.
template <class S>
inline Vec<S> kept_of(const Rnn& op, double fraction, uint64_t index, uint32_t salt) {
  return op.draws ? drawn<S>(fraction, op.seed, index, salt) : splat(static_cast<S>(fraction));
}

template <class V, class S>
inline V clamp(V x, S bound) {
  const V low = x < -bound ? V{} - bound : x;
  return low > bound ? V{} + bound : low;
}

// Where |x| <= bound (bound 0: everywhere) d, else 0.
template <class V, class S>
inline V where_within(V x, S bound, V d) {
  if (bound == 0) return d;
  return (x >= -bound && x <= bound) ? d : V{};
}

// What follows from h, whichever cell it is of: clip, zoneout, and where it goes.
template <class T, class A, class P, class V = Vec<Accum<T>>>
LLMKERN_INLINE void put_h(const RnnForwardArgs& a, const P& at, V h, A* next) {
  using S = Accum<T>;
  const Rnn& op = *a.op;
  if (!op.weight_hr) {
    S* const state = static_cast<S*>(a.h) + at.state;
    if (op.clip != 0) h = clamp(h, static_cast<S>(op.clip));
    if (op.zoneout_h != 0) {
      const V kept = kept_of<S>(op, op.zoneout_h, at.drawn(), 0);
      h = kept * at.load(state) + (1 - kept) * h;
    }
    at.store(state, h);
    at.store(static_cast<T*>(a.y) + at.token, h);
  }
  at.store(next, h);
}

// The gradient of the cell's h from that of the state; `dbefore` is what zoneout hands to the state before.
template <class T, class P, class S = Accum<T>, class V = Vec<S>>
LLMKERN_INLINE V take_dh(const RnnBackwardArgs& a, const P& at, V& dbefore) {
  const Rnn& op = *a.op;
  V dout = at.load(static_cast<const S*>(a.dh) + at.state);
  if (a.dy) dout += at.load(static_cast<const T*>(a.dy) + at.token);
  dbefore = V{};
  if (op.zoneout_h != 0) {
    const V kept = kept_of<S>(op, op.zoneout_h, at.drawn(), 0);
    dbefore = kept * dout;
    dout = (1 - kept) * dout;
  }
  return dout;
}

// The sums of a step as the products gave them: `pre` of h, a vector of each gate after the other, `gx` of x.
template <class S, class P>
struct PlainSums {
  const P& at;
  const S *pre, *gx;
  int64_t H;
  Vec<S> hidden(int g) const { return load<S>(pre + g * kLanes<S>); }
  Vec<S> input(int g) const { return at.load(gx + g * H); }
  Vec<S> output(Vec<S> o, Vec<S> cell) const { return o * tanh(cell); }
};

// The same for a backward: tanh of c, and the gradient of c from that of its argument.
struct PlainOutput {
  template <class V>
  V tanh_c(V cell) const {
    return tanh(cell);
  }
  template <class V>
  V to_cell(V d) const {
    return d;
  }
};

struct LstmCell {
  static constexpr int kGates = 4, kSaved = 4;
  template <class T, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V forward(const RnnForwardArgs& a, const P& at, const X& x) {
    const Rnn& op = *a.op;
    const int64_t H = op.H;
    const auto gate = [&](int g) { return x.hidden(g) + x.input(g); };
    const auto peep = [&](int g) { return at.load(static_cast<const T*>(op.peephole) + g * H + at.unit); };
    S* const c = static_cast<S*>(a.c) + at.c;
    const V before = at.load(c);
    V i = gate(0), f = gate(1), o = gate(3);
    if (op.peephole) {
      i += peep(0) * before;
      f += peep(1) * before;
    }
    i = sigmoid(i);
    f = sigmoid(f);
    const V g = tanh(gate(2));
    V cell = f * before + i * g;
    if (op.peephole) o += peep(2) * cell;
    o = sigmoid(o);
    const V out = x.output(o, cell);
    if (op.zoneout_c != 0) {
      const V kept = kept_of<S>(op, op.zoneout_c, at.drawn(), 1);
      cell = kept * before + (1 - kept) * cell;
    }
    at.store(c, cell);
    if (a.gates) {
      T* const to = static_cast<T*>(a.gates) + at.gates;
      at.store_apart(to, H, {i, f, g, o});
    }
    if (a.cells) at.store(static_cast<S*>(a.cells) + at.cells, cell);
    return out;
  }

  // c after the step, before zoneout mixed it.
  template <class T, class P, class S = Accum<T>>
  static LLMKERN_INLINE Vec<S> cell_of(const RnnBackwardArgs& a, const P& at, const Past& past) {
    if (a.op->zoneout_c == 0) return at.load(static_cast<const S*>(a.cells) + at.cells);
    const T* const saved = static_cast<const T*>(a.gates) + at.gates;
    const int64_t H = a.op->H;
    return at.load(saved + H) * at.load(static_cast<const S*>(a.c_before) + past.c) +
           at.load(saved) * at.load(saved + 2 * H);
  }

  // The gradients of the gates from that of h, `dout`; returns what reaches h of the step before without them.
  template <class T, class A, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V backward(const RnnBackwardArgs& a, const P& at, const Past& past, V dout, A* dgates,
                                   const X& x) {
    const Rnn& op = *a.op;
    const int64_t H = op.H;
    const T* const saved = static_cast<const T*>(a.gates) + at.gates;
    const V i = at.load(saved), f = at.load(saved + H), g = at.load(saved + 2 * H), o = at.load(saved + 3 * H);
    const V before = at.load(static_cast<const S*>(a.c_before) + past.c);
    const V cell = cell_of<T>(a, at, past);
    S* const dc = static_cast<S*>(a.dc) + at.c;
    V dcell = at.load(dc), dbefore{};
    if (a.dcells) dcell += at.load(static_cast<const S*>(a.dcells) + at.cells);
    if (op.zoneout_c != 0) {
      const V kept = kept_of<S>(op, op.zoneout_c, at.drawn(), 1);
      dbefore = kept * dcell;
      dcell = (1 - kept) * dcell;
    }
    const V tanh_c = x.tanh_c(cell);
    dout = where_within(o * tanh_c, static_cast<S>(op.clip), dout);
    const V d_o = dout * tanh_c * o * (1 - o);
    dcell += x.to_cell(dout * o * (1 - tanh_c * tanh_c));
    const auto peep = [&](int k) { return at.load(static_cast<const T*>(op.peephole) + k * H + at.unit); };
    if (op.peephole) dcell += d_o * peep(2);
    const V di = dcell * g * i * (1 - i), df = dcell * before * f * (1 - f), dg = dcell * i * (1 - g * g);
    dbefore += dcell * f;
    if (op.peephole) dbefore += di * peep(0) + df * peep(1);
    at.store(dc, dbefore);
    at.store_apart(dgates, H, {di, df, dg, d_o});
    if (a.unprojected) at.store(static_cast<T*>(a.unprojected) + at.token, o * tanh_c);
    if (a.dpeephole) {
      S* const to = static_cast<S*>(a.dpeephole) + at.b * 3 * H + at.unit;
      at.store(to, at.load(to) + di * before);
      at.store(to + H, at.load(to + H) + df * before);
      at.store(to + 2 * H, at.load(to + 2 * H) + d_o * cell);
    }
    return V{};
  }
};

struct GruCell {
  static constexpr int kGates = 3, kSaved = 4;
  template <class T, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V forward(const RnnForwardArgs& a, const P& at, const X& x) {
    const int64_t H = a.op->H;
    V hidden = x.hidden(2);
    if (a.hidden_bias) hidden += at.load(static_cast<const S*>(a.hidden_bias) + at.unit);
    const V r = sigmoid(x.hidden(0) + x.input(0)), z = sigmoid(x.hidden(1) + x.input(1));
    const V new_ = tanh(x.input(2) + r * hidden);
    if (a.gates) {
      T* const to = static_cast<T*>(a.gates) + at.gates;
      at.store_apart(to, H, {r, z, new_, hidden});
    }
    return new_ + z * (at.load(static_cast<const S*>(a.h) + at.state) - new_);
  }

  template <class T, class A, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V backward(const RnnBackwardArgs& a, const P& at, const Past& past, V dout, A* dgates,
                                   const X&) {
    const int64_t H = a.op->H;
    const T* const saved = static_cast<const T*>(a.gates) + at.gates;
    const V r = at.load(saved), z = at.load(saved + H), new_ = at.load(saved + 2 * H), hidden = at.load(saved + 3 * H);
    const V before = at.load(static_cast<const T*>(a.h_before) + past.h);
    dout = where_within(new_ + z * (before - new_), static_cast<S>(a.op->clip), dout);
    const V dn = dout * (1 - z) * (1 - new_ * new_), dr = dn * hidden * r * (1 - r);
    const V dz = dout * (before - new_) * z * (1 - z);
    at.store_apart(dgates, H, {dn * r, dr, dz, dn});
    return dout * z;
  }
};

template <bool kTanh>
struct ElmanCell {
  static constexpr int kGates = 1, kSaved = 1;
  template <class T, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V forward(const RnnForwardArgs& a, const P& at, const X& x) {
    const V sum = x.hidden(0) + x.input(0);
    V out;
    if constexpr (kTanh)
      out = tanh(sum);
    else
      out = sum < 0 ? V{} : sum;
    if (a.gates) at.store(static_cast<T*>(a.gates) + at.token, out);
    return out;
  }

  template <class T, class A, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V backward(const RnnBackwardArgs& a, const P& at, const Past&, V dout, A* dgates, const X&) {
    const V out = at.load(static_cast<const T*>(saved_of(*a.op) ? a.gates : a.y) + at.token);
    dout = where_within(out, static_cast<S>(a.op->clip), dout);
    if constexpr (kTanh)
      at.store(dgates, dout * (1 - out * out));
    else
      // A NaN lets the gradient through, as in torch.
      at.store(dgates, out <= 0 ? V{} : dout);
    return V{};
  }
};

// log(1 + x) for x in [0, 1]: 2 atanh(x / (2 + x)), a series in a number below a third. fp64 lane by lane.
inline vf32 log1p_small(vf32 x) {
  const vf32 s = x * reciprocal(2 + x), z = s * s;
  vf32 p = splat(2.0f / 13);
  for (int k = 11; k > 0; k -= 2) p = p * z + 2.0f / static_cast<float>(k);
  return s * p;
}
inline vf64 log1p_small(vf64 x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = ::log1p(x[l]);
  return x;
}

// Exponential gates, kept in range by m: with i' = exp(i - m') and f' = exp(log sigmoid(f) + m - m'), c and n carry a
// common factor exp(-m), which cancels in h = o c / n.
struct SlstmCell {
  static constexpr int kGates = 4, kSaved = 5;
  template <class T, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V forward(const RnnForwardArgs& a, const P& at, const X& x) {
    const int64_t H = a.op->H;
    const auto gate = [&](int g) { return x.hidden(g) + x.input(g); };
    S* const states = static_cast<S*>(a.c) + at.c;
    const V c = at.load(states), n = at.load(states + H), m = at.load(states + 2 * H);
    const V i = gate(0), f = gate(1), z = tanh(gate(2)), o = sigmoid(gate(3));
    const V log_f = (f < 0 ? f : V{}) - log1p_small(exp_negative(f < 0 ? f : -f));
    // Nothing is carried from a state of nothing, whatever its m.
    const V carried = log_f + m, larger = carried > i ? carried : i, m_new = n == 0 ? i : larger;
    const V i_new = exp_negative(i - m_new), f_new = n == 0 ? V{} : exp_negative(carried - m_new);
    const V c_new = f_new * c + i_new * z, n_new = f_new * n + i_new;
    at.store_apart(states, H, {c_new, n_new, m_new});
    if (a.gates) {
      T* const to = static_cast<T*>(a.gates) + at.gates;
      // With a minus where m follows it, which a backward must know better than rounding tells.
      at.store_apart(to, H, {i_new, m_new == i ? f_new : -f_new, z, o, sigmoid(f)});
    }
    if (a.cells) at.store_apart(static_cast<S*>(a.cells) + at.cells, H, {c_new, n_new, m_new});
    return o * c_new / n_new;
  }

  template <class T, class A, class P, class X, class S = Accum<T>, class V = Vec<S>>
  static LLMKERN_INLINE V backward(const RnnBackwardArgs& a, const P& at, const Past& past, V dout, A* dgates,
                                   const X&) {
    const int64_t H = a.op->H;
    const T* const saved = static_cast<const T*>(a.gates) + at.gates;
    const V i = at.load(saved), signed_f = at.load(saved + H), f = signed_f < 0 ? -signed_f : signed_f;
    const V z = at.load(saved + 2 * H), o = at.load(saved + 3 * H), open = at.load(saved + 4 * H);
    const S* const before = static_cast<const S*>(a.c_before) + past.c;
    const S* const after = static_cast<const S*>(a.cells) + at.cells;
    const V c_old = at.load(before), n_old = at.load(before + H), c = at.load(after), n = at.load(after + H);
    S* const states = static_cast<S*>(a.dc) + at.c;
    V dc = at.load(states), dn = at.load(states + H), dm = at.load(states + 2 * H);
    if (a.dcells) {
      const S* const given = static_cast<const S*>(a.dcells) + at.cells;
      dc += at.load(given);
      dn += at.load(given + H);
      dm += at.load(given + 2 * H);
    }
    const V ratio = c / n;
    dout = where_within(o * ratio, static_cast<S>(a.op->clip), dout);
    const V dratio = dout * o / n;
    dc += dratio;
    dn -= dratio * ratio;
    V di = (dc * z + dn) * i, df = (dc * c_old + dn * n_old) * f;
    // m is the larger of two numbers.
    dm -= di + df;
    const V of_i = signed_f < 0 ? V{} : dm;
    di += of_i;
    df += dm - of_i;
    at.store_apart(states, H, {dc * f, dn * f, df});
    at.store_apart(dgates, H, {di, df * (1 - open), dc * i * (1 - z * z), dout * ratio * o * (1 - o)});
    return V{};
  }
};

template <class F>
void visit_mode(RnnMode mode, const F& f) {
  switch (mode) {
    case RnnMode::lstm:
      return f(LstmCell{});
    case RnnMode::gru:
      return f(GruCell{});
    case RnnMode::rnn_tanh:
      return f(ElmanCell<true>{});
    case RnnMode::rnn_relu:
      return f(ElmanCell<false>{});
    case RnnMode::slstm:
      return f(SlstmCell{});
  }
}

// f with the types T of the tensors and A of the operands.
template <class F>
void visit_types(DType dtype, DType operand, const F& f) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (__is_same(T, bf16))
      if (operand == DType::bf16) return f(t, bf16{});
    f(t, Accum<T>{});
  });
}

}  // namespace
}  // namespace llmkern::cpu::LLMKERN_ISA
