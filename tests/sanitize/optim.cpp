#include "core/optim.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

// Array's results are NaN at first; here they are state, which is read.
Array positive(DType t, int64_t n) {
  Array x(t, n);
  for (int64_t i = 0; i < n; ++i) x.set(i, std::abs(uniform()));
  return x;
}

struct State {
  Array param, grad, avg, avg_sq, max_sq;
  bool amsgrad;
  double step;
  State(DType t, int64_t n, bool amsgrad, double step)
      : param(random(t, n)),
        grad(random(t, n)),
        avg(random(t, n)),
        avg_sq(positive(t, n)),
        max_sq(positive(t, n)),
        amsgrad(amsgrad),
        step(step) {}
};

struct Expected {
  Doubles param, avg, avg_sq, max_sq;
};

Expected adam(const cpu::Adam& op, const State& s) {
  Expected e{s.param.doubles(), s.avg.doubles(), s.avg_sq.doubles(), s.max_sq.doubles()};
  for (int64_t i = 0; i < s.param.n; ++i) {
    double g = (op.maximize ? -1 : 1) * s.grad[i];
    if (op.decoupled)
      e.param[i] *= 1 - op.lr * op.weight_decay;
    else
      g += op.weight_decay * e.param[i];
    e.avg[i] = op.beta1 * e.avg[i] + (1 - op.beta1) * g;
    e.avg_sq[i] = op.beta2 * e.avg_sq[i] + (1 - op.beta2) * g * g;
    if (s.amsgrad) e.max_sq[i] = std::max(e.max_sq[i], e.avg_sq[i]);
    const double v = (s.amsgrad ? e.max_sq[i] : e.avg_sq[i]) / (1 - std::pow(op.beta2, s.step));
    e.param[i] -= op.lr / (1 - std::pow(op.beta1, s.step)) * e.avg[i] / (std::sqrt(v) + op.eps);
  }
  return e;
}

// One step from given states; `state` receives what the state becomes, and gives what it was.
double sgd(const cpu::Sgd& op, double p, double g, double step, double& state) {
  g = (op.maximize ? -op.grad_scale : op.grad_scale) * g + op.weight_decay * p;
  if (op.momentum != 0) {
    state = step == 1 ? g : op.momentum * state + (1 - op.dampening) * g;
    g = op.nesterov ? g + op.momentum * state : state;
  }
  return p - op.lr * g;
}

double adagrad(const cpu::Adagrad& op, double p, double g, double step, double& state) {
  g = (op.maximize ? -op.grad_scale : op.grad_scale) * g + op.weight_decay * p;
  state += g * g;
  return p - op.lr / (1 + (step - 1) * op.lr_decay) * g / (std::sqrt(state) + op.eps);
}

// Of one state or none, in the dtype of the parameter and in that of arithmetic.
template <class Op, class F>
void check_step(const Op& op, bool has_state, void (*run)(const Op&, const std::vector<cpu::OptimTensor>&), F right) {
  std::vector<Array> params, grads, states;
  std::vector<Doubles> expected, expected_states;
  std::vector<cpu::OptimTensor> tensors;
  for (DType t : kDTypes)
    for (DType q : {t, accum_of(t)})
      for (int64_t n : {0, 1, 7, 33, 32 * 1024 + 5}) {
        params.push_back(random(t, n));
        grads.push_back(random(t, n));
        states.push_back(positive(q, n));
        const double step = 1 + n % 3;
        expected.push_back(params.back().doubles());
        expected_states.push_back(states.back().doubles());
        for (int64_t i = 0; i < n; ++i)
          expected.back()[i] = right(op, params.back()[i], grads.back()[i], step, expected_states.back()[i]);
        tensors.push_back({params.back().data(), grads.back().data(), {}, n, t, q, step});
        tensors.back().states[0] = has_state ? states.back().data() : nullptr;
      }
  run(op, tensors);
  for (size_t i = 0; i < params.size(); ++i) {
    near("param", params[i], expected[i], 16);
    near("state", states[i], expected_states[i], 4);
    if (op.after == cpu::After::zero) near("grad", grads[i], Doubles(grads[i].n, 0.0));
  }
  run(op, {});
}

}  // namespace

LLMKERN_CHECK(optim) {
  for (const cpu::Adam& op :
       {cpu::Adam{0.01, 0.9, 0.999, 1e-3, 0, false, false}, cpu::Adam{0.1, 0.4, 0.9, 1e-3, 0.1, true, true},
        cpu::Adam{0.01, 0.9, 0.99, 1e-3, 0.2, false, false}})
    for (bool amsgrad : {false, true}) {
      where = std::string("adam") + (amsgrad ? " amsgrad" : "") + (op.decoupled ? " decoupled" : "");
      std::vector<State> states;
      for (DType t : kDTypes)
        for (int64_t n : {0, 1, 7, 33, 32 * 1024 + 5}) states.emplace_back(t, n, amsgrad, 1 + n % 3);
      std::vector<Expected> expected;
      std::vector<cpu::OptimTensor> tensors;
      for (const State& s : states) {
        expected.push_back(adam(op, s));
        tensors.push_back({s.param.data(),
                           s.grad.data(),
                           {s.avg.data(), s.avg_sq.data(), amsgrad ? s.max_sq.data() : nullptr},
                           s.param.n,
                           s.param.dtype,
                           s.param.dtype,
                           s.step});
      }
      cpu::adam_step(op, tensors);
      for (size_t i = 0; i < states.size(); ++i) {
        near("exp_avg", states[i].avg, expected[i].avg);
        near("exp_avg_sq", states[i].avg_sq, expected[i].avg_sq);
        near("max_exp_avg_sq", states[i].max_sq, expected[i].max_sq);
        near("param", states[i].param, expected[i].param, 16);
      }
    }
  cpu::adam_step({}, {});
  for (double momentum : {0.0, 0.9})
    for (bool flag : {false, true}) {
      where = momentum > 0 ? "sgd with momentum" : "sgd";
      const cpu::Sgd op{0.1, momentum, flag ? 0 : 0.3, 0.1, flag && momentum > 0, flag, 0.5, cpu::After::zero};
      check_step(op, momentum > 0, &cpu::sgd_step, &sgd);
    }
  where = "adagrad";
  for (bool flag : {false, true})
    check_step(cpu::Adagrad{0.1, 0.2, 0.1, 1e-3, flag, 2.0, flag ? cpu::After::zero : cpu::After::scale}, true,
               &cpu::adagrad_step, &adagrad);
}

}  // namespace llmkern::sanitize
