#include "core/dropout.h"

#include "core/isa/random.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

template <class T>
void dropout_of(const T* x, int64_t begin, int64_t end, double p, uint64_t seed, T* y) {
  using S = Accum<T>;
  constexpr int L = kLanes<S>;
  const S scale = p < 1 ? static_cast<S>(1 / (1 - p)) : S{0};
  for (int64_t i = begin; i < end; i += L) {
    const int n = end - i < L ? static_cast<int>(end - i) : L;
    const Vec<S> v = load_n<S>(x + i, n);
    // A product with the mask, as torch's: what is dropped and not finite is NaN, so that guards see it.
    const Vec<S> kept = v * (drawn<S>(p, seed, static_cast<uint64_t>(i), 0) != 0 ? Vec<S>{} : splat(scale));
    store_n(y + i, kept, n);
  }
}

void dropout_any(const void* x, DType dtype, int64_t begin, int64_t end, double p, uint64_t seed, void* y) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    dropout_of(static_cast<const T*>(x), begin, end, p, seed, static_cast<T*>(y));
  });
}

}  // namespace

extern const DropoutKernels dropout{&dropout_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
