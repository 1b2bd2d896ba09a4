#include "core/embedding.h"

#include "core/row_order.h"
#include "core/table_gradient.h"
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
  const cpu::RowOrder order(at, N, V);
  const int64_t R = cpu::table_gradient_rows(order, padding_idx);
  const std::unique_ptr<int64_t[]> numbers(new int64_t[R]);
  const Array values(t, R * D);
  cpu::table_gradient_compact({dout.data(), t, D, N, order.order()}, order, padding_idx, numbers.get(), values.data());
  for (int64_t i = 0; i < R * D && !by_freq; ++i) near("values", values[i], sums[numbers[i / D] * D + i % D], t, 4);
  for (int64_t bad : {int64_t{-1}, V}) {
    if (N == 0) continue;
    const Array before(t, N * D), after(t, V * D);
    set(N - 1, bad);
    throws<std::out_of_range>("forward", [&] { cpu::embedding_forward(weight.data(), t, V, D, at, N, before.data()); });
    throws<std::out_of_range>(
        "backward", [&] { cpu::embedding_backward(dout.data(), t, V, D, at, N, padding_idx, by_freq, after.data()); });
    untouched("dweight", after);
    const Array kept(t, V * D);
    throws<std::out_of_range>("renorm", [&] { cpu::embedding_renorm(kept.data(), t, V, D, at, N, 1, 2); });
    untouched("weight", kept);
  }
}

void renorm_case(DType t, int64_t D, double p) {
  where = std::string("embedding renorm ") + name_of(t) + " " + std::to_string(D) + " norm " + text(p);
  const int32_t rows[] = {2, 0, 2};
  const Array weight = random(t, 3 * D);
  const Doubles before = weight.doubles();
  cpu::embedding_renorm(weight.data(), t, 3, D, {rows, false}, 3, 0.1, p);
  for (int64_t r = 0; r < 3; ++r) {
    double norm = p == -INFINITY ? INFINITY : 0;
    for (int64_t d = 0; d < D; ++d) {
      const double x = std::abs(before[r * D + d]);
      norm = p == INFINITY    ? std::max(norm, x)
             : p == -INFINITY ? std::min(norm, x)
                              : norm + (p == 0 ? x != 0 : std::pow(x, p));
    }
    if (p != 0 && !std::isinf(p)) norm = std::pow(norm, 1 / p);
    for (int64_t d = 0; d < D; ++d)
      near("weight", weight[r * D + d], before[r * D + d] * (r != 1 && norm > 0.1 ? 0.1 / (norm + 1e-7) : 1), t);
  }
}

}  // namespace

LLMKERN_CHECK(embedding) {
  for (DType t : kDTypes)
    for (bool wide : {false, true})
      for (int64_t D : {1, 7, 67, 131}) {
        embedding_case(t, wide, 1, D, 5, -1, false);
        embedding_case(t, wide, 3000, D, 77, 4, true);
        embedding_case(t, wide, 9, D, 1001, 3, false);
        embedding_case(t, wide, 5, D, 0, -1, false);
      }
  for (DType t : kDTypes)
    for (int64_t D : {1, 7, 131})
      for (double p : {0., 1., 2., 3.5, -1., double{INFINITY}, -double{INFINITY}}) renorm_case(t, D, p);
  // Past the caches.
  embedding_case(DType::f32, true, 66'000, 131, 33'000, 4, false);
}

}  // namespace llmkern::sanitize
