#include "core/elementwise.h"

#include "core/isa/functions.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

template <class V>
static inline V value(Unary f, V x) {
  switch (f) {
    case Unary::exp:
      return exp(x);
    case Unary::exp_negative:
      return exp_negative(x);
    case Unary::sigmoid:
      return sigmoid(x);
    case Unary::tanh:
      return tanh(x);
    case Unary::copy:
      break;
  }
  return x;
}

void apply(Unary f, const void* from, int64_t n, DType dtype, void* to) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    const T* const x = static_cast<const T*>(from);
    T* const y = static_cast<T*>(to);
    for_vectors<A>(n, [&](int64_t i, int lanes) { store_n(y + i, value(f, load_n<A>(x + i, lanes)), lanes); });
  });
}

}  // namespace

extern const ElementwiseKernels elementwise{&apply};

}  // namespace llmkern::cpu::LLMKERN_ISA
