#include "core/embedding.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

void embedding_case(DType t, bool wide, int64_t V, int64_t D, int64_t N, int64_t padding_idx, bool by_freq) {
  where = std::string("embedding ") + name_of(t) + (wide ? " int64 " : " int32 ") + std::to_string(V) + "x" +
          std::to_string(D) + " by " + std::to_string(N);
  const std::unique_ptr<char[]> bytes(new char[N * (wide ? 8 : 4)]);
  const cpu::Indices at{bytes.get(), wide};
  const auto set = [&](int64_t i, int64_t row) {
    wide ? void(reinterpret_cast<int64_t*>(bytes.get())[i] = row)
         : void(reinterpret_cast<int32_t*>(bytes.get())[i] = static_cast<int32_t>(row));
  };
  for (int64_t i = 0; i < N; ++i) set(i, (i * i + 3) % V);
  const Array weight = random(t, V * D), out(t, N * D), dout = random(t, N * D), dweight(t, V * D);
  Doubles rows(N * D), sums(V * D), counts(V);
  for (int64_t i = 0; i < N; ++i) ++counts[at[i]];
  for (int64_t i = 0; i < N * D; ++i) {
    const int64_t row = at[i / D], to = row * D + i % D;
    rows[i] = weight[to];
    if (row != padding_idx) sums[to] += by_freq ? dout[i] / counts[row] : dout[i];
  }
  cpu::embedding_forward(weight.data(), t, V, D, at, N, out.data());
  near("out", out, rows);
  cpu::embedding_backward(dout.data(), t, V, D, at, N, padding_idx, by_freq, dweight.data());
  near("dweight", dweight, sums, 4);
  for (int64_t bad : {int64_t{-1}, V}) {
    if (N == 0) continue;
    const Array before(t, N * D), after(t, V * D);
    set(N - 1, bad);
    throws<std::out_of_range>("forward", [&] { cpu::embedding_forward(weight.data(), t, V, D, at, N, before.data()); });
    throws<std::out_of_range>(
        "backward", [&] { cpu::embedding_backward(dout.data(), t, V, D, at, N, padding_idx, by_freq, after.data()); });
    untouched("dweight", after);
  }
}

}  // namespace

void check_embedding() {
  for (DType t : kDTypes)
    for (bool wide : {false, true})
      for (int64_t D : {1, 7, 67, 131}) {
        embedding_case(t, wide, 1, D, 5, -1, false);
        embedding_case(t, wide, 3000, D, 77, 4, true);
        embedding_case(t, wide, 9, D, 1001, 3, false);
        embedding_case(t, wide, 5, D, 0, -1, false);
      }
}

}  // namespace llmkern::sanitize
