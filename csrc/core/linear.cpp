// A linear layer: matrix products.
//
// FLOPs: 2 N I O for each of y, dx and dweight; the products run at the speed of core/gemm.cpp. The bias is what
// the sums start from, so that it costs no pass over y; its gradient, a sum over rows, is left to the caller.
#include "core/linear.h"

#include "core/gemm.h"

namespace llmkern::cpu {

WideBias::WideBias(const void* bias, DType dtype, int64_t n)
    : wide_(bias && itemsize(dtype) == 2 ? n : 0), data_(bias) {
  if (!bias || itemsize(dtype) != 2) return;
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < n; ++i) wide_[i] = static_cast<float>(to_double(static_cast<const T*>(bias)[i]));
  });
  data_ = wide_.get();
}

void linear_forward(const void* x, const void* weight, const void* bias, DType dtype, int64_t N, int64_t I, int64_t O,
                    void* y) {
  const WideBias wide(bias, dtype, O);
  gemm(N, O, I, {.data = x, .dtype = dtype, .ld = I}, {.data = weight, .dtype = dtype, .ld = I, .transposed = true},
       {.data = y, .dtype = dtype, .ld = O}, false, wide.get());
}

void linear_backward(const void* dy, const void* x, const void* weight, DType dtype, int64_t N, int64_t I, int64_t O,
                     void* dx, void* dweight) {
  if (dx)
    gemm(N, I, O, {.data = dy, .dtype = dtype, .ld = O}, {.data = weight, .dtype = dtype, .ld = I},
         {.data = dx, .dtype = dtype, .ld = I}, false);
  if (dweight)
    gemm(O, I, N, {.data = dy, .dtype = dtype, .ld = O, .transposed = true}, {.data = x, .dtype = dtype, .ld = I},
         {.data = dweight, .dtype = dtype, .ld = I}, false);
}

}  // namespace llmkern::cpu
