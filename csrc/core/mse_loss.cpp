// Squared error: (x - t)^2, summed or not, and its gradient 2 * (x - t) * g.
//
// Traffic. Sum: reads 2N. Elementwise: reads 2N, writes N. Backward: reads 2N (3N with elementwise g),
// writes N for each gradient that is wanted. Three FLOPs an element, so all run at memory speed in one pass.
//
// The sum is taken over chunks of a fixed size, each in fp32 (fp64 for fp64) over a fixed number of lanes;
// the chunks' sums are added in fp64, in order. So the bits depend neither on the number of threads nor on
// who took which chunk.
#include "core/mse_loss.h"

#include <algorithm>

#include "core/memory.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kChunk = 8192;
constexpr int64_t kGrain = 16 * 1024;

const void* at(const void* p, int64_t i, DType dtype) {
  return p ? static_cast<const char*>(p) + i * static_cast<int64_t>(itemsize(dtype)) : nullptr;
}

void* at(void* p, int64_t i, DType dtype) { return const_cast<void*>(at(static_cast<const void*>(p), i, dtype)); }

}  // namespace

double mse_loss_forward_sum(const void* input, const void* target, DType dtype, int64_t N) {
  const int64_t chunks = (N + kChunk - 1) / kChunk;
  const Buffer<double> partial(chunks);
  const auto& kernels = LLMKERN_SELECT(mse_loss);
  parallel_for(chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = c * kChunk;
      partial[c] = kernels.sum(at(input, i, dtype), at(target, i, dtype), dtype, std::min(kChunk, N - i));
    }
  });
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c];
  return sum;
}

void mse_loss_forward(const void* input, const void* target, DType dtype, int64_t N, void* out) {
  const auto& kernels = LLMKERN_SELECT(mse_loss);
  parallel_for(N, kGrain, [&](int64_t i, int64_t end) {
    kernels.forward(at(input, i, dtype), at(target, i, dtype), dtype, end - i, at(out, i, dtype));
  });
}

void mse_loss_backward(const void* dloss, double dsum, const void* input, const void* target, DType dtype, int64_t N,
                       void* dinput, void* dtarget) {
  const auto& kernels = LLMKERN_SELECT(mse_loss);
  parallel_for(N, kGrain, [&](int64_t i, int64_t end) {
    kernels.backward(at(dloss, i, dtype), dsum, at(input, i, dtype), at(target, i, dtype), dtype, end - i,
                     at(dinput, i, dtype), at(dtarget, i, dtype));
  });
}

}  // namespace llmkern::cpu
