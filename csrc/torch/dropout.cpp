#include "core/dropout.h"

#include "torch/tensor.h"

namespace llmkern {
namespace {

Tensor dropout_forward(const Tensor& x, double p, int64_t seed) {
  require_contiguous(x, "x");
  require(p >= 0 && p <= 1, "dropout: expected a probability between 0 and 1, got " + std::to_string(p));
  Tensor y = empty(x, sizes_of(x));
  cpu::dropout(x.const_data_ptr(), dtype_of(x), x.numel(), p, static_cast<uint64_t>(seed), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) { m.impl("dropout_forward", TORCH_BOX(&dropout_forward)); }

}  // namespace llmkern
