#include "core/quantized_embedding.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

void quantized_case(DType t, int bits, int64_t V, int64_t D, int64_t N) {
  where = std::string("quantized_embedding ") + name_of(t) + " bits " + std::to_string(bits) + " " + std::to_string(V) +
          "x" + std::to_string(D) + " by " + std::to_string(N);
  cpu::QuantizedTable table{nullptr, nullptr, nullptr, V, D, bits};
  const Array weight = random(t, V * D, 1), scale(DType::f32, V), offset(DType::f32, V);
  const std::unique_ptr<uint8_t[]> data(new uint8_t[V * table.row_bytes()]);
  cpu::quantize_rows(weight.data(), t, V, D, bits, data.get(), static_cast<float*>(scale.data()),
                     static_cast<float*>(offset.data()));
  table.data = data.get();
  table.scale = static_cast<const float*>(scale.data());
  table.offset = static_cast<const float*>(offset.data());
  const std::unique_ptr<int32_t[]> at(new int32_t[N]);
  for (int64_t i = 0; i < N; ++i) at[i] = static_cast<int32_t>((i * i + 3) % V);
  const Array out(t, N * D, 1);
  cpu::quantized_embedding_forward(table, {at.get(), false}, N, t, out.data());
  for (int64_t i = 0; i < N * D; ++i) {
    const int64_t row = at[i / D];
    const double bound = scale[row] / 2 + 2 * (epsilon(t) + epsilon(DType::f32));
    if (!(std::abs(out[i] - weight[row * D + i % D]) <= bound)) fail("further than scale / 2 from the original");
  }
  for (int32_t bad : {-1, static_cast<int32_t>(V)})
    if (N > 0) {
      at[N - 1] = bad;
      throws<std::out_of_range>("forward",
                                [&] { cpu::quantized_embedding_forward(table, {at.get(), false}, N, t, out.data()); });
    }
  if (V * D == 0) return;
  for (double bad : {std::nan(""), HUGE_VAL}) {
    weight.set(V * D - 1, bad);
    cpu::quantize_rows(weight.data(), t, V, D, bits, data.get(), static_cast<float*>(scale.data()),
                       static_cast<float*>(offset.data()));
    if (!std::isnan(scale[V - 1]) || (V > 1 && std::isnan(scale[0]))) fail("a row that is not finite is not marked");
  }
}

}  // namespace

LLMKERN_CHECK(quantized_embedding) {
  for (DType t : kDTypes)
    for (int bits : {8, 4})
      for (int64_t D : {0, 1, 2, 7, 31, 32, 33, 67, 131}) {
        quantized_case(t, bits, 1, D, 5);
        quantized_case(t, bits, 300, D, 77);
        quantized_case(t, bits, 5, D, 0);
      }
}

}  // namespace llmkern::sanitize
