#include "core/mse_loss.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

void mse_loss_case(DType t, int64_t N, int64_t skip) {
  where = std::string("mse_loss ") + name_of(t) + " " + std::to_string(N) + " from " + std::to_string(skip);
  const Array x = random(t, N, skip), y = random(t, N, skip), dloss = random(t, N, skip);
  const double dsum = 0.375;
  double sum = 0;
  Doubles squares(N), dx(N), dy(N), dx_each(N);
  for (int64_t i = 0; i < N; ++i) {
    const double d = x[i] - y[i];
    sum += squares[i] = d * d;
    dx[i] = 2 * d * dsum;
    dy[i] = -dx[i];
    dx_each[i] = 2 * d * dloss[i];
  }
  const auto out = [&] { return Array(t, N, skip); };
  const Array forward = out(), a = out(), b = out(), c = out(), d = out(), e = out(), f = out(), g = out();
  const auto sum_of = [&](void* dinput, void* dtarget) {
    near("sum", cpu::mse_loss_forward_sum(x.data(), y.data(), t, N, dsum, dinput, dtarget), sum, accum_of(t));
  };
  sum_of(nullptr, nullptr);
  sum_of(a.data(), b.data());
  sum_of(f.data(), nullptr);
  sum_of(nullptr, g.data());
  cpu::mse_loss_forward(x.data(), y.data(), t, N, forward.data());
  cpu::mse_loss_backward(nullptr, dsum, x.data(), y.data(), t, N, c.data(), d.data());
  cpu::mse_loss_backward(dloss.data(), 0, x.data(), y.data(), t, N, e.data(), nullptr);
  near("forward", forward, squares);
  near("dinput", c, dx);
  near("dtarget", d, dy);
  near("dinput of each", e, dx_each);
  same("dinput of the sum", a, c);
  same("dinput alone", f, c);
  same("dtarget of the sum", b, d);
  same("dtarget alone", g, d);
}

}  // namespace

LLMKERN_CHECK(mse_loss) {
  for (DType t : kDTypes)
    for (int64_t N : {0, 1, 7, 8191, 24577})
      for (int64_t skip : {0, 1}) mse_loss_case(t, N, skip);
  // Gradients that go past the caches.
  for (int64_t skip : {0, 1}) mse_loss_case(DType::f32, (1 << 22) + 5, skip);
  mse_loss_case(DType::bf16, (1 << 23) + 5, 0);
}

}  // namespace llmkern::sanitize
