#include "core/row_optim.h"

#include "core/isa/optim_rules.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// Rows that are added up before their sum is added to the others'; as in table_gradient.cpp, for the same bits.
constexpr int64_t kSummed = 128;

template <class Rule>
inline constexpr bool kIsAdam = false;
template <class S, bool amsgrad>
inline constexpr bool kIsAdam<AdamRule<S, amsgrad>> = true;
template <class Rule>
inline constexpr bool kIsSgd = false;
template <class S, bool momentum>
inline constexpr bool kIsSgd<SgdRule<S, momentum>> = true;

template <class S>
inline bool any(decltype(Vec<S>{} < Vec<S>{}) mask) {
  for (int l = 0; l < kLanes<S>; ++l)
    if (mask[l] != 0) return true;
  return false;
}

// As memory of type T would keep it between two steps.
template <class T>
inline Vec<Accum<T>> kept(Vec<Accum<T>> x) {
  if constexpr (sizeof(T) == sizeof(Accum<T>)) return x;
  T memory[kLanes<Accum<T>>];
  store(memory, x);
  return load<Accum<T>>(memory);
}

// A row that has had `applied` of the steps on record. T: parameter; Q: states.
template <class T, class Q, class Rule>
class TableRow {
 public:
  using S = Accum<T>;
  using V = Vec<S>;
  static constexpr int L = kLanes<S>, kStates = Rule::kStates;

  TableRow(const RowTable& table, int64_t row, int64_t applied, int64_t next)
      : table_(table),
        applied_(applied),
        to_next_((next - row) * table.D),
        closed_(table.rule.closed && applied < table.count),
        D_(table.D) {
    param_ = static_cast<T*>(table.param) + row * D_;
    for (int k = 0; k < kStates; ++k) states_[k] = static_cast<Q*>(table.states[k]) + row * D_;
    if (!closed_) return;
    const RowRecord& r = table.history[applied];
    for (int i = 0; i < 4; ++i) keep_[i] = static_cast<S>(r.keep[i]);
    for (int i = 0; i < 2; ++i) {
      weight_[i] = static_cast<S>(r.weight[i]);
      eps_[i] = static_cast<S>(r.eps[i]);
    }
    least_ = static_cast<S>(r.least);
  }

  void lookup(bool stream, T* out) const {
    stream = stream && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
    columns(0, D_, [&](int64_t i, auto get, auto put) {
      V p, states[kStates + 1];
      load_up_to_date(i, get, p, states);
      stream&& i + L <= D_ ? store_streaming(out + i, p) : put(out + i, p);
    });
  }

  void catch_up() const {
    if (applied_ == table_.count) return;
    columns(0, D_, [&](int64_t i, auto get, auto put) {
      V p, states[kStates + 1];
      load_up_to_date(i, get, p, states);
      keep(i, put, p, states);
    });
  }

  void step(const Rule& rule, const T* values, const uint32_t* order, int64_t n, int64_t later, int64_t begin,
            int64_t end) const {
    const auto update = [&](int64_t i, auto get, auto put, V g) {
      V p, states[kStates + 1];
      __builtin_prefetch(values + later * D_ + i);
      load_up_to_date(i, get, p, states);
      rule.update(p, kept<T>(g), states);
      keep(i, put, p, states);
    };
    const auto get = [](const auto* from) { return load<S>(from); };
    const auto put = [](auto* to, V v) { store(to, v); };
    int64_t i = begin;
    // Four vectors of columns at a time: a pass over the run reads whole cache lines in order.
    for (; i + 4 * L <= end; i += 4 * L) {
      V sum[4];
      gradient<4>(values + i, order, n, get, sum);
      for (int v = 0; v < 4; ++v) update(i + v * L, get, put, sum[v]);
    }
    columns(i, end, [&](int64_t at, auto get_some, auto put_some) {
      V sum[1];
      gradient<1>(values + at, order, n, get_some, sum);
      update(at, get_some, put_some, sum[0]);
    });
  }

 private:
  // f(i, get, put) for each vector of columns, the last of which may be a tail.
  template <class F>
  static void columns(int64_t begin, int64_t end, const F& f) {
    int64_t i = begin;
    for (; i + L <= end; i += L)
      f(i, [](const auto* from) { return load<S>(from); }, [](auto* to, V v) { store(to, v); });
    if (const int n = static_cast<int>(end - i); n > 0)
      f(i, [n](const auto* from) { return load<S>(from, n, S{0}); }, [n](auto* to, V v) { store(to, v, n); });
  }

  template <int N, class Get>
  void gradient(const T* values, const uint32_t* order, int64_t n, const Get& get, V (&sum)[N]) const {
    for (V& s : sum) s = V{};
    for (int64_t j0 = 0; j0 < n; j0 += kSummed) {
      V part[N] = {};
      for (int64_t j = j0; j < n && j < j0 + kSummed; ++j)
        for (int v = 0; v < N; ++v) part[v] += get(values + order[j] * D_ + v * L);
      for (int v = 0; v < N; ++v) sum[v] += part[v];
    }
  }

  template <class Get>
  void load_up_to_date(int64_t i, const Get& get, V& p, V* states) const {
    p = get(param_ + i);
    __builtin_prefetch(param_ + i + to_next_);
    for (int k = 0; k < kStates; ++k) {
      states[k] = get(states_[k] + i);
      __builtin_prefetch(states_[k] + i + to_next_);
    }
    if (closed_ && pass(p, states)) return;
    for (int64_t u = applied_; u < table_.count; ++u) {
      reinterpret_cast<const Rule*>(table_.history[u].rule)->update(p, V{}, states);
      p = kept<T>(p);
      for (int k = 0; k < kStates; ++k) states[k] = kept<Q>(states[k]);
    }
  }

  template <class Put>
  void keep(int64_t i, const Put& put, V p, const V* states) const {
    put(param_ + i, p);
    for (int k = 0; k < kStates; ++k) put(states_[k] + i, states[k]);
  }

  // All pending steps at once; false if that would not be accurate.
  bool pass(V& p, V* states) const {
    if constexpr (kIsAdam<Rule>) {
      V &m = states[0], &v = states[1];
      const V root = sqrt(kStates == 3 ? states[2] : v);
      if (least_ > 0 && any<S>((root < least_) & (m != 0))) return false;
      // Both nodes over their common denominator: one division.
      const V near = root + eps_[0], far = root + eps_[1];
      const V change = m * (weight_[0] * far + weight_[1] * near) / (near * far);
      // Without a past, nothing; 0 / 0 where eps is 0, as in the dense step.
      p = fma(p, splat(keep_[0]), -change);
      m *= keep_[1];
      v *= keep_[2];
      return true;
    }
    if constexpr (kIsSgd<Rule>) {
      if constexpr (kStates == 0) {
        p *= keep_[0];
      } else {
        const V before = p;
        p = fma(p, splat(keep_[0]), keep_[1] * states[0]);
        states[0] = fma(before, splat(keep_[2]), keep_[3] * states[0]);
      }
      return true;
    }
    return false;
  }

  const RowTable& table_;
  const int64_t applied_, to_next_;
  const bool closed_;
  const int64_t D_;
  T* param_;
  Q* states_[kStates + 1];
  S keep_[4]{}, weight_[2]{}, eps_[2]{}, least_{};
};

template <class T_, class Q_, class Rule_>
struct Types {
  using T = T_;
  using Q = Q_;
  using Rule = Rule_;
};

// f(types) by the types of the table and its rule.
template <class F>
void visit_table(const RowTable& table, const F& f) {
  visit(table.dtype, [&](auto t) {
    using T = decltype(t);
    using S = Accum<T>;
    const auto with_rule = [&](auto q) {
      using Q = decltype(q);
      switch (table.rule.kind) {
        case RowOptim::adam:
          return table.states[2] ? f(Types<T, Q, AdamRule<S, true>>{}) : f(Types<T, Q, AdamRule<S, false>>{});
        case RowOptim::sgd:
          return table.states[0] ? f(Types<T, Q, SgdRule<S, true>>{}) : f(Types<T, Q, SgdRule<S, false>>{});
        case RowOptim::adagrad:
          return f(Types<T, Q, AdagradRule<S, false>>{});
      }
    };
    table.state_dtype == table.dtype ? with_rule(t) : with_rule(S{});
  });
}

void lookup(const RowTable& table, int64_t row, int64_t applied, int64_t next, bool stream, void* out) {
  visit_table(table, [&](auto types) {
    using Y = decltype(types);
    TableRow<typename Y::T, typename Y::Q, typename Y::Rule>(table, row, applied, next)
        .lookup(stream, static_cast<typename Y::T*>(out));
  });
}

void catch_up(const RowTable& table, int64_t row, int64_t applied, int64_t next) {
  visit_table(table, [&](auto types) {
    using Y = decltype(types);
    TableRow<typename Y::T, typename Y::Q, typename Y::Rule>(table, row, applied, next).catch_up();
  });
}

void step(const RowTable& table, const unsigned char* rule, int64_t row, int64_t applied, int64_t next,
          const void* values, const uint32_t* order, int64_t n, int64_t later, int64_t begin, int64_t end) {
  visit_table(table, [&](auto types) {
    using Y = decltype(types);
    TableRow<typename Y::T, typename Y::Q, typename Y::Rule>(table, row, applied, next)
        .step(*reinterpret_cast<const typename Y::Rule*>(rule), static_cast<const typename Y::T*>(values), order, n,
              later, begin, end);
  });
}

void make_rule(const RowTable& table, const RowStep& u, double scale, unsigned char* bytes) {
  const RowRule& r = table.rule;
  visit_table(table, [&](auto types) {
    using Rule = typename decltype(types)::Rule;
    static_assert(sizeof(Rule) <= sizeof RowRecord::rule);
    const auto write = [&](const Rule& rule) { memcpy(bytes, &rule, sizeof rule); };
    if constexpr (kIsAdam<Rule>)
      write(Rule(Adam{.lr = u.lr,
                      .beta1 = u.first,
                      .beta2 = u.second,
                      .eps = u.eps,
                      .weight_decay = u.weight_decay,
                      .decoupled = r.decoupled,
                      .maximize = r.maximize,
                      .grad_scale = scale},
                 u.step));
    else if constexpr (kIsSgd<Rule>)
      write(Rule(Sgd{.lr = u.lr,
                     .momentum = u.first,
                     .dampening = u.second,
                     .weight_decay = u.weight_decay,
                     .nesterov = r.nesterov,
                     .maximize = r.maximize,
                     .grad_scale = scale},
                 u.step));
    else
      write(Rule(Adagrad{.lr = u.lr,
                         .lr_decay = u.first,
                         .weight_decay = u.weight_decay,
                         .eps = u.eps,
                         .maximize = r.maximize,
                         .grad_scale = scale},
                 u.step));
  });
}

}  // namespace

extern const RowOptimKernels row_optim{
    .lookup = &lookup, .catch_up = &catch_up, .step = &step, .make_rule = &make_rule};

}  // namespace llmkern::cpu::LLMKERN_ISA
