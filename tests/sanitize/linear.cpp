#include "core/linear.h"

#include "sanitize.h"

namespace llmkern::sanitize {

LLMKERN_CHECK(linear) {
  for (DType t : kDTypes)
    for (const auto& [N, I, O] : {std::array<int64_t, 3>{1, 7, 5}, {3, 65, 33}, {19, 31, 47}}) {
      where = std::string("linear ") + name_of(t) + " " + std::to_string(N) + "x" + std::to_string(I);
      const Array x = random(t, N * I), weight = random(t, O * I), bias = random(t, O), dy = random(t, N * O);
      const Doubles xs = x.doubles(), w = weight.doubles(), dys = dy.doubles();
      Doubles y(N * O), dx(N * I), dw(O * I);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t o = 0; o < O; ++o)
          for (int64_t i = 0; i < I; ++i) {
            y[n * O + o] += xs[n * I + i] * w[o * I + i];
            dx[n * I + i] += dys[n * O + o] * w[o * I + i];
            dw[o * I + i] += dys[n * O + o] * xs[n * I + i];
          }
      const Array plain(t, N * O), biased(t, N * O), dinput(t, N * I), dweight(t, O * I);
      cpu::linear_forward(x.data(), weight.data(), nullptr, t, N, I, O, plain.data());
      near("y", plain, y, 4);
      for (int64_t i = 0; i < N * O; ++i) y[i] += bias[i % O];
      cpu::linear_forward(x.data(), weight.data(), bias.data(), t, N, I, O, biased.data());
      near("y with bias", biased, y, 4);
      cpu::linear_backward(dy.data(), x.data(), weight.data(), t, N, I, O, dinput.data(), dweight.data());
      near("dx", dinput, dx, 4);
      near("dweight", dweight, dw, 4);
      cpu::linear_backward(dy.data(), x.data(), weight.data(), t, N, I, O, nullptr, nullptr);
    }
}

}  // namespace llmkern::sanitize
