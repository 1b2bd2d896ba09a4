// Optimizer steps, elementwise.
//
// Traffic of Adam: parameter, gradient and two averages read once, all but the gradient written once: 28 bytes an
// element in fp32. All tensors share one parallel region: they are cut into chunks of 32K elements, and the chunks
// are dealt to the threads in one row. An element is computed the same way whatever chunk it is in.
#include "core/optim.h"

#include <algorithm>

#include "core/threads.h"

namespace llmkern::cpu {

void adam_step(const Adam& op, const std::vector<AdamTensor>& tensors) {
  constexpr int64_t kChunk = 32 * 1024;
  // first[i]: the number of chunks before tensor i.
  std::vector<int64_t> first{0};
  for (const AdamTensor& tensor : tensors) first.push_back(first.back() + (tensor.n + kChunk - 1) / kChunk);
  const auto& kernels = LLMKERN_SELECT(optim);
  parallel_for(first.back(), 1, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[t + 1]) ++t;
      const int64_t from = (chunk - first[t]) * kChunk;
      kernels.adam(op, tensors[t], from, std::min(from + kChunk, tensors[t].n));
    }
  });
}

}  // namespace llmkern::cpu
