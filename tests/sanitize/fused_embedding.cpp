#include "core/fused_embedding.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

using cpu::Norm;

// Row numbers that lie in a block of exactly their size.
struct Places {
  std::unique_ptr<int32_t[]> data;
  Places(int64_t n, int64_t rows) : data(new int32_t[n]) {
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<int32_t>((i * i + 2 * i + 3) % rows);
  }
  cpu::Indices indices() const { return {data.get(), false}; }
};

// What is right, in double: one row at a time.
struct Truth {
  Doubles out, tables[3], norm_weight, norm_bias;
};

Truth truth(const cpu::FusedEmbedding& op, const Array tables[3], const Array& weight, const Array& bias,
            const Array& dout, const Array& kept, int64_t padding_idx) {
  const int64_t D = op.D;
  Truth t{Doubles(op.N * D), {}, Doubles(D), Doubles(D)};
  for (int k = 0; k < 3; ++k) t.tables[k].resize(op.tables[k].rows * D);
  for (int64_t n = 0; n < op.N; ++n) {
    Doubles x(D), g(D);
    double mean = 0, square = 0, shift = 0, slope = 0;
    for (int64_t d = 0; d < D; ++d) {
      for (int k = 0; k < 3; ++k)
        if (op.tables[k].period > 0) x[d] += (k == 0 ? op.scale : 1) * tables[k][op.tables[k].row(n) * D + d];
      mean += op.norm == Norm::layer ? x[d] / D : 0;
    }
    for (int64_t d = 0; d < D; ++d) square += (x[d] - mean) * (x[d] - mean) / D;
    const double rstd = op.norm == Norm::none ? 1 : 1 / std::sqrt(square + op.eps);
    for (int64_t d = 0; d < D; ++d) {
      const int64_t i = n * D + d;
      x[d] = (x[d] - mean) * rstd;
      const double dy = kept[i] * dout[i], w = op.norm_weight ? weight[d] : 1;
      t.out[i] = kept[i] == 0 ? 0 : kept[i] * (x[d] * w + (op.norm_bias ? bias[d] : 0));
      t.norm_weight[d] += dy * x[d];
      t.norm_bias[d] += dy;
      g[d] = dy * w;
      shift += op.norm == Norm::layer ? g[d] / D : 0;
      slope += op.norm == Norm::none ? 0 : g[d] * x[d] / D;
    }
    for (int64_t d = 0; d < D; ++d)
      for (int k = 0; k < 3; ++k)
        if (op.tables[k].period > 0 && !(k == 0 && op.tables[0].row(n) == padding_idx))
          t.tables[k][op.tables[k].row(n) * D + d] += (k == 0 ? op.scale : 1) * rstd * (g[d] - shift - x[d] * slope);
  }
  return t;
}

void fused_embedding_case(DType dtype, Norm norm, double p, int64_t D, int64_t B, int64_t L) {
  where = std::string("fused_embedding ") + name_of(dtype) + " norm " + std::to_string(static_cast<int>(norm)) + " p " +
          text(p) + " " + std::to_string(B) + "x" + std::to_string(L) + "x" + std::to_string(D);
  const DType accum = accum_of(dtype);
  const int64_t N = B * L, V = 7, rows[] = {V, L + 2, 2}, periods[] = {N, L, N > 0 ? 1 : 0};
  const Array tables[] = {random(dtype, V * D, 1), random(dtype, rows[1] * D), random(dtype, rows[2] * D)};
  const Array weight = random(dtype, D), bias = random(dtype, D), dout = random(dtype, N * D, 1);
  const Places at[] = {{N, V}, {L, rows[1]}, {1, 2}};
  cpu::FusedEmbedding op{dtype, N, D, {}, 1.5, norm, nullptr, nullptr, 0.1, p, 5};
  for (int k = 0; k < 3; ++k) op.tables[k] = {tables[k].data(), rows[k], at[k].indices(), periods[k]};
  if (norm != Norm::none) {
    op.norm_weight = weight.data();
    op.norm_bias = bias.data();
  }
  // The mask, by which a row of ones comes out.
  const Array ones(dtype, D), kept(accum, N * D), plain(dtype, N * D), none(accum, 0);
  for (int64_t d = 0; d < D; ++d) ones.set(d, 1);
  cpu::FusedEmbedding mask = op;
  std::unique_ptr<int32_t[]> zeros(new int32_t[1]());
  mask.tables[0] = {ones.data(), 1, {zeros.get(), false}, N > 0 ? 1 : 0};
  mask.tables[1] = mask.tables[2] = {};
  mask.norm = Norm::none;
  mask.norm_weight = mask.norm_bias = nullptr;
  mask.scale = 1;
  cpu::fused_embedding_forward(mask, plain.data(), none.data());
  for (int64_t i = 0; i < N * D; ++i) kept.set(i, plain[i] == 0 ? 0 : 1 / (1 - p));

  const Truth want = truth(op, tables, weight, bias, dout, kept, 4);
  const Array out(dtype, N * D), stats(accum, norm == Norm::none ? 0 : 2 * N);
  cpu::fused_embedding_forward(op, out.data(), stats.data());
  near("out", out, want.out, 4);
  const Array dtables[] = {{dtype, V * D}, {dtype, rows[1] * D}, {dtype, rows[2] * D}};
  const Array dweight(dtype, D), dbias(dtype, D);
  const bool normed = norm != Norm::none;
  cpu::fused_embedding_backward(op, dout.data(), stats.data(),
                                {{dtables[0].data(), dtables[1].data(), dtables[2].data()},
                                 normed ? dweight.data() : nullptr,
                                 normed ? dbias.data() : nullptr,
                                 4,
                                 false});
  // A bias's gradient is a sum of N terms, a token type's one of N rows.
  const double terms = static_cast<double>(N) / 4 + 8;
  for (int k = 0; k < 3; ++k) near("dtable", dtables[k], want.tables[k], terms);
  if (normed) {
    near("dnorm_weight", dweight, want.norm_weight, terms);
    near("dnorm_bias", dbias, want.norm_bias, terms);
  }

  for (int k = 0; k < 3 && N > 0; ++k)
    for (int32_t bad : {-1, static_cast<int32_t>(rows[k])}) {
      const Array before(dtype, N * D), after(dtype, V * D);
      std::swap(at[k].data[0], bad);
      throws<std::out_of_range>("forward", [&] { cpu::fused_embedding_forward(op, before.data(), stats.data()); });
      throws<std::out_of_range>("backward", [&] {
        cpu::fused_embedding_backward(op, dout.data(), stats.data(),
                                      {{after.data(), nullptr, nullptr}, nullptr, nullptr, -1, true});
      });
      untouched("out", before);
      untouched("dtable", after);
      std::swap(at[k].data[0], bad);
    }
}

}  // namespace

LLMKERN_CHECK(fused_embedding) {
  for (DType dtype : kDTypes)
    for (Norm norm : {Norm::none, Norm::layer, Norm::rms})
      for (double p : {0.0, 0.25})
        for (int64_t D : {1, 7, 67}) {
          fused_embedding_case(dtype, norm, p, D, 3, 5);
          fused_embedding_case(dtype, norm, p, D, 41, 3);
          fused_embedding_case(dtype, norm, p, D, 0, 4);
        }
}

}  // namespace llmkern::sanitize
