// Optimizer steps, elementwise.
//
// Traffic: parameter, gradient and states read once, all but the gradient written once; for Adam in fp32 28 bytes an
// element. All tensors share one parallel region: they are cut into chunks of 32K elements, and the chunks are dealt to
// the threads in one row. An element is computed the same way whatever chunk it is in.
#include "core/optim.h"

#include <algorithm>

#include "core/threads.h"

namespace llmkern::cpu {
namespace {

template <class Op>
void step(OptimKernel<Op> kernel, const Op& op, const std::vector<OptimTensor>& tensors) {
  constexpr int64_t kChunk = 32 * 1024;
  // first[i]: the number of chunks before tensor i.
  std::vector<int64_t> first{0};
  for (const OptimTensor& tensor : tensors) first.push_back(first.back() + (tensor.n + kChunk - 1) / kChunk);
  parallel_for(first.back(), 1, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[t + 1]) ++t;
      const int64_t from = (chunk - first[t]) * kChunk;
      kernel(op, tensors[t], from, std::min(from + kChunk, tensors[t].n));
    }
  });
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
