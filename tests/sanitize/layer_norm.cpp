#include "core/layer_norm.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

struct Case {
  DType dtype, affine;
  int64_t N, D, skip;
  bool rms, has_weight, has_bias;
};

void layer_norm_case(const Case& c) {
  where = std::string("layer_norm ") + name_of(c.dtype) + " with " + name_of(c.affine) + " " + std::to_string(c.N) +
          "x" + std::to_string(c.D) + (c.rms ? " rms" : "");
  const double eps = 0.25;
  const int64_t size = c.N * c.D;
  const Array x = random(c.dtype, size, c.skip), dy = random(c.dtype, size, c.skip);
  const Array weight = random(c.affine, c.D, c.skip), bias = random(c.affine, c.D, c.skip);
  Doubles y(size), dx(size), dweight(c.D), dbias(c.D);
  for (int64_t n = 0; n < c.N; ++n) {
    double mean = 0, square = 0, shift = 0, slope = 0;
    for (int64_t d = 0; d < c.D && !c.rms; ++d) mean += x[n * c.D + d] / static_cast<double>(c.D);
    for (int64_t d = 0; d < c.D; ++d) square += std::pow(x[n * c.D + d] - mean, 2) / static_cast<double>(c.D);
    const double rstd = 1 / std::sqrt(square + eps);
    const auto normal = [&](int64_t d) { return (x[n * c.D + d] - mean) * rstd; };
    const auto g = [&](int64_t d) { return dy[n * c.D + d] * (c.has_weight ? weight[d] : 1); };
    for (int64_t d = 0; d < c.D; ++d) {
      y[n * c.D + d] = normal(d) * (c.has_weight ? weight[d] : 1) + (c.has_bias ? bias[d] : 0);
      shift += c.rms ? 0 : g(d) / static_cast<double>(c.D);
      slope += g(d) * normal(d) / static_cast<double>(c.D);
      dweight[d] += dy[n * c.D + d] * normal(d);
      dbias[d] += dy[n * c.D + d];
    }
    for (int64_t d = 0; d < c.D; ++d) dx[n * c.D + d] = (g(d) - shift - normal(d) * slope) * rstd;
  }
  const cpu::LayerNorm op{.dtype = c.dtype,
                          .affine = c.affine,
                          .N = c.N,
                          .D = c.D,
                          .x = x.data(),
                          .weight = c.has_weight ? weight.data() : nullptr,
                          .bias = c.has_bias ? bias.data() : nullptr,
                          .eps = eps,
                          .rms = c.rms};
  const Array out(c.dtype, size, c.skip), stats(accum_of(c.dtype), 2 * c.N, c.skip);
  cpu::layer_norm_forward(op, out.data(), stats.data());
  near("y", out, y, 2);
  const Array to_x(c.dtype, size, c.skip), to_weight(c.affine, c.D, c.skip), to_bias(c.affine, c.D, c.skip);
  cpu::layer_norm_backward(op, dy.data(), stats.data(),
                           {.x = to_x.data(), .weight = to_weight.data(), .bias = to_bias.data()});
  near("dx", to_x, dx, 4);
  near("dweight", to_weight, dweight, static_cast<double>(c.N));
  near("dbias", to_bias, dbias, static_cast<double>(c.N));
  // Each alone.
  const Array x_alone(c.dtype, size, c.skip), bias_alone(c.affine, c.D, c.skip);
  cpu::layer_norm_backward(op, dy.data(), stats.data(), {.x = x_alone.data(), .weight = nullptr, .bias = nullptr});
  cpu::layer_norm_backward(op, dy.data(), stats.data(), {.x = nullptr, .weight = nullptr, .bias = bias_alone.data()});
  same("dx alone", x_alone, to_x);
  same("dbias alone", bias_alone, to_bias);
}

}  // namespace

LLMKERN_CHECK(layer_norm) {
  for (DType t : kDTypes)
    for (const auto& [N, D] : {std::array<int64_t, 2>{0, 5}, {3, 0}, {1, 1}, {5, 7}, {67, 33}, {131, 64}, {3, 2051}})
      for (bool rms : {false, true}) {
        layer_norm_case({t, t, N, D, N % 2, rms, true, !rms});
        layer_norm_case({t, t, N, D, 1, rms, false, D % 2 == 1});
        if (itemsize(t) == 2) layer_norm_case({t, DType::f32, N, D, 0, rms, true, true});
      }
  // Rows that go past the caches.
  for (int64_t skip : {0, 1}) layer_norm_case({DType::f32, DType::f32, (1 << 12) + 3, 1024, skip, false, true, true});
}

}  // namespace llmkern::sanitize
