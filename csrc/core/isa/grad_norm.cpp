#include "core/grad_norm.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

vf64 squares(vf64 sum, vf64 x) { return fma(x, x, sum); }

// The lanes of x in two halves.
vf64 squares(vf64 sum, vf32 x) {
  typedef float half __attribute__((vector_size(kVectorBytes / 2)));
  half parts[2];
  memcpy(parts, &x, sizeof x);
  return squares(squares(sum, __builtin_convertvector(parts[0], vf64)), __builtin_convertvector(parts[1], vf64));
}

// Four independent sums hide the latency of the addition.
template <class T>
double sum_of_squares(const T* x, int64_t n) {
  using S = Accum<T>;
  constexpr int L = kLanes<S>;
  vf64 s[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) s[k] = squares(s[k], load<S>(x + i + k * L));
  for (; i < n; i += L) s[0] = squares(s[0], load_n<S>(x + i, n - i < L ? static_cast<int>(n - i) : L));
  return reduce_add<double>((s[0] + s[1]) + (s[2] + s[3]));
}

double sum_any(const void* x, int64_t n, DType dtype) {
  return visit(dtype, [&](auto t) { return sum_of_squares(static_cast<const decltype(t)*>(x), n); });
}

template <class T>
void scale(T* x, int64_t n, double factor) {
  using S = Accum<T>;
  const S by = static_cast<S>(factor);
  for_vectors<S>(n, [&](int64_t i, int lanes) { store_n(x + i, by * load_n<S>(x + i, lanes), lanes); });
}

void scale_any(void* x, int64_t n, DType dtype, double factor) {
  visit(dtype, [&](auto t) { scale(static_cast<decltype(t)*>(x), n, factor); });
}

}  // namespace

extern const GradNormKernels grad_norm{.sum_of_squares = &sum_any, .scale = &scale_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
