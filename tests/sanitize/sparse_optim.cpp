#include "core/sparse_optim.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

using Row = std::vector<double*>;

// One element: p and its states, from a gradient that is scaled and signed. `mean` is that of the row's squares.
void right(const cpu::Sgd& op, double g, double, double, const Row& x) { *x[0] -= op.lr * g; }
void right(const cpu::Adagrad& op, double g, double, double step, const Row& x) {
  *x[1] += g * g;
  *x[0] -= op.lr / (1 + (step - 1) * op.lr_decay) * g / (std::sqrt(*x[1]) + op.eps);
}
void right(const cpu::SparseAdam& op, double g, double, double, const Row& x) {
  *x[1] += (1 - op.beta1) * (g - *x[1]);
  *x[2] += (1 - op.beta2) * (g * g - *x[2]);
  *x[0] -= op.step_size * *x[1] / (std::sqrt(*x[2]) + op.eps);
}
// The state is of the row: every element adds its part, and `total` is where it will be.
void right(const cpu::RowWiseAdagrad& op, double g, double total, double, const Row& x) {
  *x[0] -= op.lr * g / (std::sqrt(total) + op.eps);
}

// Rows come several times and others never; `skip` moves the values off their alignment.
template <class Op>
void check(const Op& op, int n_states, DType t, DType q, int64_t V, int64_t D, int64_t N, bool is_int64) {
  const bool rowwise = std::is_same_v<Op, cpu::RowWiseAdagrad>;
  where = "sparse_optim " + std::string(name_of(t)) + " V " + std::to_string(V) + " D " + std::to_string(D);
  std::vector<int64_t> wide(N);
  std::vector<int32_t> narrow(N);
  for (int64_t i = 0; i < N; ++i) narrow[i] = static_cast<int32_t>(wide[i] = N < 100 && i % 3 == 0 ? 0 : i * 7 % V);
  const Array param = random(t, V * D), values = random(t, N * D, 1);
  const Array first = random(q, rowwise ? V : V * D), second = random(q, V * D);
  for (const Array* state : {&first, &second})
    for (int64_t i = 0; i < state->n; ++i) state->set(i, std::abs((*state)[i]));
  Doubles sums(V * D), want = param.doubles(), want1 = first.doubles(), want2 = second.doubles();
  std::vector<bool> named(V);
  for (int64_t i = 0; i < N; ++i) named[wide[i]] = true;
  for (int64_t i = 0; i < N * D; ++i) sums[wide[i / D] * D + i % D] += values[i];
  double squares = 0;
  for (int64_t r = 0; r < V; ++r) {
    double mean = 0;
    for (int64_t i = r * D; i < (r + 1) * D; ++i) {
      squares += sums[i] * sums[i];
      sums[i] *= (op.maximize ? -1 : 1) * op.grad_scale;
      mean += sums[i] * sums[i] / D;
    }
    if (rowwise && named[r]) want1[r] += mean;
    for (int64_t i = r * D; named[r] && i < (r + 1) * D; ++i)
      right(op, sums[i], rowwise ? want1[r] : 0, 3, {&want[i], &want1[rowwise ? r : i], &want2[i]});
  }
  const void* indices = is_int64 ? static_cast<const void*>(wide.data()) : narrow.data();
  const cpu::RowGradient grad{{indices, is_int64}, values.data(), N, V, D, t};
  near("sum of squares", cpu::sparse_sum_of_squares(grad), squares, DType::f32, squares + 1);
  cpu::sparse_step(op, grad, {param.data(), {first.data(), n_states > 1 ? second.data() : nullptr}, q, 3});
  near("param", param, want, 64);
  if (n_states > 0) near("first state", first, want1, 64);
  if (n_states > 1) near("second state", second, want2, 64);
}

void check_bad_indices() {
  where = "sparse_optim, bad indices";
  const Array param = random(DType::f32, 6), before = random(DType::f32, 6), values = random(DType::f32, 4);
  std::memcpy(before.data(), param.data(), 6 * sizeof(float));
  for (int64_t bad : {int64_t{-1}, int64_t{3}, INT64_MAX}) {
    const int64_t indices[] = {0, bad};
    const cpu::RowGradient grad{{indices, true}, values.data(), 2, 3, 2, DType::f32};
    const auto step = [&] {
      cpu::sparse_step(cpu::Sgd{1, 0, 0, 0, false, false}, grad, {param.data(), {}, DType::f32, 1});
    };
    throws<std::out_of_range>("step", step);
    throws<std::out_of_range>("norm", [&] { cpu::sparse_sum_of_squares(grad); });
  }
  same("param", param, before);
}

}  // namespace

LLMKERN_CHECK(sparse_optim) {
  for (DType t : kDTypes)
    for (DType q : {t, accum_of(t)})
      for (int64_t D : {1, 7, 33, 128})
        for (int64_t N : {0, 1, 40}) {
          check(cpu::Sgd{0.1, 0, 0, 0, false, true, 0.5}, 0, t, q, 9, D, N, true);
          check(cpu::Adagrad{0.1, 0.2, 0, 1e-2, false, 2.0}, 1, t, q, 9, D, N, false);
          check(cpu::SparseAdam{0.1, 0.7, 0.9, 1e-2, false, 0.5}, 2, t, q, 9, D, N, true);
          check(cpu::RowWiseAdagrad{0.1, 1e-2, true, 0.5}, 1, t, accum_of(t), 9, D, N, false);
        }
  // More than one thread's share.
  check(cpu::Adagrad{0.1, 0.2, 0, 1e-2, false, 1.0}, 1, DType::f32, DType::f32, 3000, 33, 9000, true);
  // Half of the batch in one row: pieces.
  check(cpu::Adagrad{0.1, 0.2, 0, 1e-2, false, 0.01}, 1, DType::f64, DType::f64, 2, 33, 700, true);
  check(cpu::Adagrad{0.1, 0.2, 0, 1e-2, false, 0.01}, 1, DType::bf16, DType::f32, 2, 33, 700, true);
  check_bad_indices();
}

}  // namespace llmkern::sanitize
