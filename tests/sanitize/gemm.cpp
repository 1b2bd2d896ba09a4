#include "core/gemm.h"

#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

// A (rows, cols) matrix with unused elements between its lines, none after the last.
struct Operand {
  int64_t rows, cols, ld;
  bool transposed;
  Array data;

  Operand(DType dtype, int64_t rows, int64_t cols, bool transposed, int64_t pad)
      : rows(rows),
        cols(cols),
        ld((transposed ? rows : cols) + pad),
        transposed(transposed),
        data(random(dtype, length(transposed ? cols : rows, transposed ? rows : cols))) {}
  int64_t length(int64_t lines, int64_t width) const { return lines && width ? (lines - 1) * ld + width : 0; }
  cpu::Matrix matrix() const { return {data.data(), data.dtype, ld, transposed}; }
  Doubles by_rows() const {
    Doubles x(rows * cols);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) x[i * cols + j] = data[transposed ? j * ld + i : i * ld + j];
    return x;
  }
};

// a (M, K) times b (K, N).
Doubles product(const Doubles& a, const Doubles& b, int64_t M, int64_t N, int64_t K) {
  Doubles c(M * N);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < N; ++j) c[i * N + j] += a[i * K + k] * b[k * N + j];
  return c;
}

struct Types {
  DType a, b, c;
};

void gemm_case(int64_t M, int64_t N, int64_t K, Types types, bool a_transposed, bool b_transposed, int64_t pad) {
  const Operand A(types.a, M, K, a_transposed, pad), B(types.b, K, N, b_transposed, pad);
  const Doubles expected = product(A.by_rows(), B.by_rows(), M, N, K);
  const int64_t ldc = N + pad;
  const Array bias = random(accum_of(types.c), N);
  for (const char* mode : {"plain", "accumulate", "bias"}) {
    const bool accumulate = !std::strcmp(mode, "accumulate"), biased = !std::strcmp(mode, "bias");
    where = std::string("gemm ") + mode + " " + std::to_string(M) + "x" + std::to_string(N) + "x" + std::to_string(K) +
            " " + name_of(types.a) + name_of(types.b) + name_of(types.c) + (a_transposed ? " A^T" : "") +
            (b_transposed ? " B^T" : "") + " pad " + std::to_string(pad);
    Array C(types.c, (M - 1) * ldc + N);
    for (int64_t i = 0; accumulate && i < M; ++i)
      for (int64_t j = 0; j < N; ++j) C.set(i * ldc + j, static_cast<double>((i + j) % 7 - 3));
    cpu::gemm(M, N, K, A.matrix(), B.matrix(), {.data = C.data(), .dtype = types.c, .ld = ldc}, accumulate,
              biased ? bias.data() : nullptr);
    for (int64_t i = 0; i < M; ++i)
      for (int64_t j = 0; j < ldc && i * ldc + j < C.n; ++j) {
        if (j >= N) {
          if (!std::isnan(C[i * ldc + j])) fail("written between the rows of C");
          continue;
        }
        const double start = accumulate ? static_cast<double>((i + j) % 7 - 3) : biased ? bias[j] : 0;
        near("C", C[i * ldc + j], expected[i * N + j] + start, types.c, std::sqrt(static_cast<double>(K) + 1));
      }
  }
}

void check_convert() {
  for (DType t : kDTypes)
    for (int64_t n : {0, 1, 7, 33, 3 * (1 << 15) + 5}) {
      where = std::string("convert to ") + name_of(t) + " " + std::to_string(n);
      const Array from = random(accum_of(t), n), to(t, n, 1);
      cpu::convert(from.data(), n, to.data(), t);
      for (int64_t i = 0; i < n; ++i)
        if (!(std::abs(to[i] - from[i]) <= epsilon(t) * std::max(std::abs(from[i]), 0x1p-14)))
          fail("got " + text(to[i]));
    }
}

// No rows, or no columns: nothing is read or written.
void check_empty() {
  using enum DType;
  const Array none(f32, 0), c(f32, 3);
  cpu::gemm(0, 3, 2, {none.data(), f32, 2}, {c.data(), f32, 3}, {none.data(), f32, 3}, false);
  cpu::gemm(3, 0, 2, {c.data(), f32, 2}, {none.data(), f32, 0}, {none.data(), f32, 0}, true);
}

}  // namespace

LLMKERN_CHECK(gemm) {
  using enum DType;
  const Types all[] = {{f32, f32, f32},  {bf16, bf16, bf16}, {bf16, bf16, f32}, {f16, f16, f16},
                       {f32, bf16, f32}, {f16, f32, bf16},   {bf16, f32, f16},  {f64, f64, f64}};
  const int64_t small[][3] = {{1, 1, 1},   {1, 33, 7},  {1, 300, 65}, {2, 5, 3},     {3, 17, 129}, {4, 31, 1025},
                              {33, 1, 65}, {15, 31, 0}, {15, 33, 31}, {29, 67, 385}, {7, 130, 771}};
  for (const auto& [M, N, K] : small)
    for (const Types& types : all)
      for (int layout = 0; layout < 4; ++layout)
        for (int64_t pad : {0, 3}) gemm_case(M, N, K, types, layout & 1, layout & 2, pad);
  // Several passes over k, and more rows than one pass packs at once.
  const int64_t large[][3] = {{5, 35, 9301},  {15, 17, 9301},  {1, 19, 9303},
                              {343, 35, 387}, {345, 18, 9303}, {339, 17, 3103}};
  int layout = 0;
  for (const auto& [M, N, K] : large)
    for (const Types& types : all) {
      ++layout;
      gemm_case(M, N, K, types, layout & 1, layout & 2, layout % 3);
    }
  // The same for pairs, which take two numbers at a step.
  for (const auto& [M, N, K] : {std::array<int64_t, 3>{345, 18, 18437}, {339, 17, 6201}})
    for (DType c : {bf16, f32}) {
      ++layout;
      gemm_case(M, N, K, {bf16, bf16, c}, layout & 1, layout & 2, layout % 3);
    }
  check_convert();
  check_empty();
  where = "gemm of mixed types";
  const Array x = random(f64, 1), y = random(f32, 1), z(f32, 1);
  throws<std::invalid_argument>(
      "f64 by f32", [&] { cpu::gemm(1, 1, 1, {x.data(), f64, 1}, {y.data(), f32, 1}, {z.data(), f32, 1}, false); });
  untouched("C", z);
}

}  // namespace llmkern::sanitize
