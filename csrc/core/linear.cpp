// A linear layer: matrix products.
//
// FLOPs: 2 N I O for each of y, dx and dweight; the products run at the speed of core/gemm.cpp. The bias is what
// the sums start from, so that it costs no pass over y; its gradient, a sum over rows, is left to the caller.
#include "core/linear.h"

#include "core/gemm.h"
#include "core/memory.h"

namespace llmkern::cpu {

void linear_forward(const void* x, const void* weight, const void* bias, DType dtype, int64_t N, int64_t I, int64_t O,
                    void* y) {
  // Low precision: the sums start from the bias in fp32.
  const bool widen = bias && itemsize(dtype) == 2;
  const Buffer<float> wide(widen ? O : 0);
  if (widen)
    visit(dtype, [&](auto t) {
      using T = decltype(t);
      for (int64_t o = 0; o < O; ++o) wide[o] = static_cast<float>(to_double(static_cast<const T*>(bias)[o]));
    });
  gemm(N, O, I, {x, dtype, I, false}, {weight, dtype, I, true}, y, dtype, O, false, widen ? wide.get() : bias);
}

void linear_backward(const void* dy, const void* x, const void* weight, DType dtype, int64_t N, int64_t I, int64_t O,
                     void* dx, void* dweight) {
  if (dx) gemm(N, I, O, {dy, dtype, O, false}, {weight, dtype, I, false}, dx, dtype, I, false);
  if (dweight) gemm(O, I, N, {dy, dtype, O, true}, {x, dtype, I, false}, dweight, dtype, I, false);
}

}  // namespace llmkern::cpu
