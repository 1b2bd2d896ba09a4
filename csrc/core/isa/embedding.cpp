#include "core/embedding.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// Four vectors of columns stay in registers while the run's rows pass by: one store per element, however long the run.
template <class T>
void sum_rows(const T* rows, int64_t D, const uint32_t* order, int64_t count, Accum<T> scale, T* out) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; d + 4 * L <= D; d += 4 * L) {
    Vec<A> s0{}, s1{}, s2{}, s3{};
    for (int64_t j = 0; j < count; ++j) {
      const T* row = rows + order[j] * D + d;
      s0 += load<A>(row), s1 += load<A>(row + L), s2 += load<A>(row + 2 * L), s3 += load<A>(row + 3 * L);
    }
    store(out + d, s0 * scale), store(out + d + L, s1 * scale);
    store(out + d + 2 * L, s2 * scale), store(out + d + 3 * L, s3 * scale);
  }
  for (; d < D; d += L) {
    const int n = D - d < L ? static_cast<int>(D - d) : L;
    Vec<A> s{};
    for (int64_t j = 0; j < count; ++j) s += load<A>(rows + order[j] * D + d, n, A{});
    store(out + d, s * scale, n);
  }
}

void sum_rows_any(const void* rows, DType dtype, int64_t D, const uint32_t* order, int64_t count, double scale,
                  void* out) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    sum_rows(static_cast<const T*>(rows), D, order, count, static_cast<Accum<T>>(scale), static_cast<T*>(out));
  });
}

}  // namespace

extern const EmbeddingKernels embedding{&sum_rows_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
