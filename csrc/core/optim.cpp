// Optimizer steps, elementwise.
//
// Traffic: parameter, gradient and states read once, all but the gradient written once; for Adam in fp32 28 bytes an
// element. All tensors share one parallel region (chunks.h). An element is computed the same way whatever chunk it is
// in.
#include "core/optim.h"

#include "core/chunks.h"

namespace llmkern::cpu {
namespace {

template <class Op>
void step(OptimKernel<Op> kernel, const Op& op, const std::vector<OptimTensor>& tensors) {
  TensorChunks(tensors).parallel(
      [&](const OptimTensor& tensor, int64_t begin, int64_t end, int64_t) { kernel(op, tensor, begin, end); });
}

}  // namespace

void adam_step(const Adam& op, const std::vector<OptimTensor>& tensors) {
  step(LLMKERN_SELECT(optim).adam, op, tensors);
}

void sgd_step(const Sgd& op, const std::vector<OptimTensor>& tensors) { step(LLMKERN_SELECT(optim).sgd, op, tensors); }

void adagrad_step(const Adagrad& op, const std::vector<OptimTensor>& tensors) {
  step(LLMKERN_SELECT(optim).adagrad, op, tensors);
}

}  // namespace llmkern::cpu
