// The cells: what one step makes of the sums of its products, forward and backward, for a few units of a few sequences.
//
// About 60 instructions for a vector of units of an lstm forward, 40 backward, where the products take 8 H / lanes. A
// cell is one struct: `forward` takes the sums of the gates and the states and returns the new ones, `backward` the
// gradients. What is optional costs a branch that is always taken the same way.
#pragma once
#include "core/isa/functions.h"
#include "core/isa/random.h"
#include "core/isa/simd.h"
#include "core/rnn.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

template <class S, class T>
inline Vec<S> load_n(const T* p, int n) {
  return n == kLanes<S> ? load<S>(p) : load<S>(p, n, S{0});
}
template <class S, class T>
inline void store_n(T* p, Vec<S> v, int n) {
  n == kLanes<S> ? store(p, v) : store(p, v, n);
}

// Of elements [index, index + lanes) of a state under zoneout, the share that is kept: drawn in training, 0 or 1, else
// the same of all. `salt` tells h from c.
template <class S>
inline Vec<S> kept_of(const Rnn& op, double share, uint64_t index, uint32_t salt) {
  return op.draws ? drawn<S>(share, op.seed, index, salt) : splat(static_cast<S>(share));
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

// The position of one vector of units in every array of a step.
template <class T>
struct At {
  const Rnn& op;
  int64_t b, token, unit;
  int n;
  int64_t state() const { return b * op.H + unit; }
  int64_t cell() const { return token * op.H + unit; }
  uint64_t drawn(int64_t step) const { return static_cast<uint64_t>(step * op.B + b) * op.H + unit; }
};

struct LstmCell {
  static constexpr int kGates = 4;
  template <class T, class S = Accum<T>, class V = Vec<S>>
  static V forward(const RnnForwardArgs& a, const At<T>& at, int64_t step, const S* pre, const S* gx) {
    const Rnn& op = *a.op;
    const int64_t H = op.H;
    const int n = at.n;
    const auto gate = [&](int g) { return load<S>(pre + g * kLanes<S>) + load_n<S>(gx + g * H, n); };
    const auto peep = [&](int g) { return load_n<S>(static_cast<const T*>(op.peephole) + g * H + at.unit, n); };
    S* const c = static_cast<S*>(a.c) + at.state();
    const V before = load_n<S>(c, n);
    V i = gate(0), f = gate(1), o = gate(3);
    if (op.peephole) i += peep(0) * before, f += peep(1) * before;
    i = sigmoid(i), f = sigmoid(f);
    const V g = tanh(gate(2));
    V cell = f * before + i * g;
    if (op.peephole) o += peep(2) * cell;
    o = sigmoid(o);
    const V out = o * tanh(cell);
    if (op.zoneout_c != 0) {
      const V kept = kept_of<S>(op, op.zoneout_c, at.drawn(step), 1);
      cell = kept * before + (1 - kept) * cell;
    }
    store_n<S>(c, cell, n);
    if (a.gates) {
      T* const to = static_cast<T*>(a.gates) + at.token * 4 * H + at.unit;
      store_n<S>(to, i, n), store_n<S>(to + H, f, n), store_n<S>(to + 2 * H, g, n), store_n<S>(to + 3 * H, o, n);
    }
    if (a.cells) store_n<S>(static_cast<S*>(a.cells) + at.cell(), cell, n);
    return out;
  }

  // The gradients of the gates from that of h, `dout`; returns what reaches h of the step before without them.
  template <class T, class A, class S = Accum<T>, class V = Vec<S>>
  static V backward(const RnnBackwardArgs& a, const At<T>& at, int64_t step, int64_t row, V dout, A* dgates) {
    const Rnn& op = *a.op;
    const int64_t H = op.H;
    const int n = at.n;
    const T* const saved = static_cast<const T*>(a.gates) + at.token * 4 * H + at.unit;
    const V i = load_n<S>(saved, n), f = load_n<S>(saved + H, n), g = load_n<S>(saved + 2 * H, n),
            o = load_n<S>(saved + 3 * H, n);
    const V before = load_n<S>(static_cast<const S*>(a.c_before) + row * a.c_stride + at.unit, n);
    V cell = load_n<S>(static_cast<const S*>(a.cells) + at.cell(), n);
    S* const dc = static_cast<S*>(a.dc) + at.state();
    V dcell = load_n<S>(dc, n), passed{};
    if (a.dcells) dcell += load_n<S>(static_cast<const S*>(a.dcells) + at.cell(), n);
    if (op.zoneout_c != 0) {
      const V kept = kept_of<S>(op, op.zoneout_c, at.drawn(step), 1);
      passed = kept * dcell, dcell = (1 - kept) * dcell, cell = f * before + i * g;
    }
    const V squashed = tanh(cell);
    dout = where_within(o * squashed, static_cast<S>(op.clip), dout);
    const V d_o = dout * squashed * o * (1 - o);
    dcell += dout * o * (1 - squashed * squashed);
    const auto peep = [&](int k) { return load_n<S>(static_cast<const T*>(op.peephole) + k * H + at.unit, n); };
    if (op.peephole) dcell += d_o * peep(2);
    const V di = dcell * g * i * (1 - i), df = dcell * before * f * (1 - f), dg = dcell * i * (1 - g * g);
    passed += dcell * f;
    if (op.peephole) passed += di * peep(0) + df * peep(1);
    store_n<S>(dc, passed, n);
    store_n<S>(dgates, di, n), store_n<S>(dgates + H, df, n);
    store_n<S>(dgates + 2 * H, dg, n), store_n<S>(dgates + 3 * H, d_o, n);
    if (a.unprojected) store_n<S>(static_cast<T*>(a.unprojected) + at.cell(), o * squashed, n);
    if (a.dpeephole) {
      S* const to = static_cast<S*>(a.dpeephole) + at.b * 3 * H + at.unit;
      store_n<S>(to, load_n<S>(to, n) + di * before, n);
      store_n<S>(to + H, load_n<S>(to + H, n) + df * before, n);
      store_n<S>(to + 2 * H, load_n<S>(to + 2 * H, n) + d_o * cell, n);
    }
    return V{};
  }
};

struct GruCell {
  static constexpr int kGates = 3;
  template <class T, class S = Accum<T>, class V = Vec<S>>
  static V forward(const RnnForwardArgs& a, const At<T>& at, int64_t, const S* pre, const S* gx) {
    const int64_t H = a.op->H;
    const int n = at.n;
    const auto sum = [&](int g) { return load<S>(pre + g * kLanes<S>); };
    V hidden = sum(2);
    if (a.hidden_bias) hidden += load_n<S>(static_cast<const S*>(a.hidden_bias) + at.unit, n);
    const V r = sigmoid(sum(0) + load_n<S>(gx, n)), z = sigmoid(sum(1) + load_n<S>(gx + H, n));
    const V new_ = tanh(load_n<S>(gx + 2 * H, n) + r * hidden);
    if (a.gates) {
      T* const to = static_cast<T*>(a.gates) + at.token * 4 * H + at.unit;
      store_n<S>(to, r, n), store_n<S>(to + H, z, n), store_n<S>(to + 2 * H, new_, n),
          store_n<S>(to + 3 * H, hidden, n);
    }
    return new_ + z * (load_n<S>(static_cast<const S*>(a.h) + at.state(), n) - new_);
  }

  template <class T, class A, class S = Accum<T>, class V = Vec<S>>
  static V backward(const RnnBackwardArgs& a, const At<T>& at, int64_t, int64_t, V dout, A* dgates) {
    const int64_t H = a.op->H;
    const int n = at.n;
    const T* const saved = static_cast<const T*>(a.gates) + at.token * 4 * H + at.unit;
    const V r = load_n<S>(saved, n), z = load_n<S>(saved + H, n), new_ = load_n<S>(saved + 2 * H, n),
            hidden = load_n<S>(saved + 3 * H, n);
    const V before = load_n<S>(static_cast<const T*>(a.h_before) + at.cell(), n);
    dout = where_within(new_ + z * (before - new_), static_cast<S>(a.op->clip), dout);
    const V dn = dout * (1 - z) * (1 - new_ * new_), dr = dn * hidden * r * (1 - r);
    const V dz = dout * (before - new_) * z * (1 - z);
    store_n<S>(dgates, dn * r, n), store_n<S>(dgates + H, dr, n);
    store_n<S>(dgates + 2 * H, dz, n), store_n<S>(dgates + 3 * H, dn, n);
    return dout * z;
  }
};

template <bool kTanh>
struct ElmanCell {
  static constexpr int kGates = 1;
  template <class T, class S = Accum<T>, class V = Vec<S>>
  static V forward(const RnnForwardArgs& a, const At<T>& at, int64_t, const S* pre, const S* gx) {
    const V x = load<S>(pre) + load_n<S>(gx, at.n);
    V out;
    if constexpr (kTanh)
      out = tanh(x);
    else
      out = x < 0 ? V{} : x;
    if (a.gates) store_n<S>(static_cast<T*>(a.gates) + at.cell(), out, at.n);
    return out;
  }

  template <class T, class A, class S = Accum<T>, class V = Vec<S>>
  static V backward(const RnnBackwardArgs& a, const At<T>& at, int64_t, int64_t, V dout, A* dgates) {
    const V out = load_n<S>(static_cast<const T*>(saved_of(*a.op) ? a.gates : a.y) + at.cell(), at.n);
    dout = where_within(out, static_cast<S>(a.op->clip), dout);
    if constexpr (kTanh)
      store_n<S>(dgates, dout * (1 - out * out), at.n);
    else
      store_n<S>(dgates, out > 0 ? dout : V{}, at.n);
    return V{};
  }
};

}  // namespace
}  // namespace llmkern::cpu::LLMKERN_ISA
