#include "core/elementwise.h"

#include "core/isa/functions.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

template <class V>
static inline V value(Unary f, V x) {
  return f == Unary::exp            ? exp(x)
         : f == Unary::exp_negative ? exp_negative(x)
         : f == Unary::sigmoid      ? sigmoid(x)
         : f == Unary::tanh         ? tanh(x)
                                    : x;
}

void apply(Unary f, const void* from, int64_t n, DType dtype, void* to) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    constexpr int L = kLanes<A>;
    const T* x = static_cast<const T*>(from);
    T* y = static_cast<T*>(to);
    int64_t i = 0;
    for (; i + L <= n; i += L) store(y + i, value(f, load<A>(x + i)));
    if (i < n) store(y + i, value(f, load<A>(x + i, static_cast<int>(n - i), A{})), static_cast<int>(n - i));
  });
}

}  // namespace

extern const ElementwiseKernels elementwise{&apply};

}  // namespace llmkern::cpu::LLMKERN_ISA
