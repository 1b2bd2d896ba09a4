#include "core/row_optim.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

constexpr int64_t kSteps = 9;

// The dense optimizer: p and its states, all rows in every step.
struct Dense {
  cpu::RowRule rule;
  bool amsgrad;
  Doubles p, states[3];

  void step(const cpu::RowStep& u, const Doubles& grad) {
    for (size_t i = 0; i < p.size(); ++i) {
      double g = (rule.maximize ? -1 : 1) * grad[i];
      if (rule.decoupled)
        p[i] *= 1 - u.lr * u.weight_decay;
      else
        g += u.weight_decay * p[i];
      double &first = states[0][i], &second = states[1][i], &largest = states[2][i];
      if (rule.kind == cpu::RowOptim::adam) {
        first = u.first * first + (1 - u.first) * g;
        second = u.second * second + (1 - u.second) * g * g;
        largest = std::max(largest, second);
        const double root = std::sqrt((amsgrad ? largest : second) / (1 - std::pow(u.second, u.step)));
        p[i] -= u.lr / (1 - std::pow(u.first, u.step)) * first / (root + u.eps);
      } else if (rule.kind == cpu::RowOptim::sgd) {
        first = u.step == 1 ? g : u.first * first + (1 - u.second) * g;
        p[i] -= u.lr * (rule.nesterov ? g + u.first * first : first);
      } else {
        first += g * g;
        p[i] -= u.lr / (1 + (u.step - 1) * u.first) * g / (std::sqrt(first) + u.eps);
      }
    }
  }
};

void row_case(DType t, DType state_dtype, cpu::RowRule rule, bool amsgrad, double decay, int64_t V, int64_t D) {
  where = std::string("row_optim ") + name_of(t) + " kind " + std::to_string(static_cast<int>(rule.kind)) +
          (rule.closed ? " closed " : " replay ") + std::to_string(V) + "x" + std::to_string(D);
  const int n_states = rule.kind == cpu::RowOptim::adam ? 2 + amsgrad : 1;
  const Array param = random(t, V * D);
  const std::vector<Array> states = [&] {
    std::vector<Array> made;
    for (int k = 0; k < n_states; ++k) made.emplace_back(state_dtype, V * D);
    for (const Array& state : made) std::memset(state.data(), 0, V * D * itemsize(state_dtype));
    return made;
  }();
  // Room for the steps on record and no more.
  const std::unique_ptr<cpu::RowRecord[]> history(new cpu::RowRecord[kSteps]);
  const std::unique_ptr<int32_t[]> applied(new int32_t[V]());
  cpu::RowTable table{param.data(), {}, t, state_dtype, V, D, applied.get(), history.get(), 0, rule};
  Dense dense{rule, amsgrad, param.doubles(), {}};
  for (Doubles& state : dense.states) state = Doubles(V * D);
  for (int k = 0; k < n_states; ++k) table.states[k] = states[k].data();
  for (int64_t s = 0; s < kSteps; ++s) {
    const cpu::RowStep step{1.0 + s, 0.05 / (1 + s), 0.9, rule.kind == cpu::RowOptim::sgd ? 0.1 : 0.99, 1e-3, decay};
    // An empty batch, one of different rows, long runs of one row.
    const int64_t N = s == 2 ? 0 : s % 3 == 1 ? 400 : 5;
    const std::unique_ptr<int64_t[]> rows(new int64_t[N]);
    for (int64_t i = 0; i < N; ++i) rows[i] = s % 3 == 1 ? i % 2 * (V - 1) : (s * s + i) % V;
    const cpu::Indices indices{rows.get(), true};
    const Array values = random(t, N * D), out(t, N * D);
    Doubles grad(V * D), looked_up(N * D);
    for (int64_t i = 0; i < N * D; ++i) {
      grad[rows[i / D] * D + i % D] += 0.5 * values[i];
      looked_up[i] = dense.p[rows[i / D] * D + i % D];
    }
    if (rule.closed) {
      cpu::row_lookup(table, indices, N, out.data());
      near("looked up", out, looked_up, 4);
    } else
      cpu::row_catch_up(table, cpu::RowOrder(indices, N, V));
    dense.step(step, grad);
    table.count += cpu::row_step(table, step, 0.5, cpu::RowOrder(indices, N, V), values.data());
  }
  cpu::row_catch_up(table);
  near("param", param, dense.p, 16);
  // Gradients are rounded to t.
  for (int k = 0; k < n_states; ++k)
    for (int64_t i = 0; i < V * D; ++i) near("state", states[k][i], dense.states[k][i], t, 64);
}

}  // namespace

LLMKERN_CHECK(row_optim) {
  using Kind = cpu::RowOptim;
  for (int64_t D : {0, 1, 17, 64, 131})
    for (bool closed : {true, false}) {
      for (bool amsgrad : {false, true})
        row_case(DType::f32, DType::f32, {Kind::adam, true, amsgrad, false, closed}, amsgrad, 0.1, 7, D);
      row_case(DType::f32, DType::f32, {Kind::sgd, false, false, !closed, closed}, false, 0.1, 7, D);
    }
  for (DType t : kDTypes)
    for (int64_t D : {3, 65}) {
      row_case(t, accum_of(t), {Kind::adam, false, true, false, false}, false, 0.1, 5, D);
      row_case(t, accum_of(t), {Kind::adagrad, false, false, false, false}, false, 0, 5, D);
      row_case(t, t, {Kind::sgd, false, false, true, false}, false, 0, 5, D);
    }
}

}  // namespace llmkern::sanitize
