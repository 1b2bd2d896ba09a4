// Squared error: (x - t)^2, summed or not, and its gradient 2 * (x - t) * g.
//
// Traffic. Sum: reads 2N. Elementwise: reads 2N, writes N. Backward: reads 2N (3N with elementwise g),
// writes N for each gradient that is wanted. Three FLOPs an element, so all run at memory speed in one pass.
// The sum writes the gradients in its own pass, which saves the 2N that a backward would read again: for the gradient
// that the sum will most likely get. If another comes, ops/mse_loss.py computes them anew.
//
// The sum is taken over chunks of a fixed size, each in fp32 (fp64 for fp64) over a fixed number of lanes;
// the chunks' sums are added in fp64, in order. So the bits depend neither on the number of threads nor on
// who took which chunk.
#include "core/mse_loss.h"

#include <algorithm>

#include "core/memory.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kChunk = 8192;
constexpr int64_t kGrain = 16 * 1024;

// Calls f(i, n) for disjoint ranges of n elements from i on. They begin at whole chunks, and so where vectors are
// aligned if the tensors are.
template <class F>
void for_ranges(int64_t N, const F& f) {
  parallel_for(ceil_div(N, kChunk), kGrain / kChunk,
               [&](int64_t begin, int64_t end) { f(begin * kChunk, std::min(N, end * kChunk) - begin * kChunk); });
}

bool streams(int64_t N, DType dtype) { return N * itemsize(dtype) >= kStreamBytes; }

}  // namespace

double mse_loss_forward_sum(const void* input, const void* target, DType dtype, int64_t N, double dsum, void* dinput,
                            void* dtarget) {
  const int64_t chunks = ceil_div(N, kChunk);
  const Buffer<double> partial(chunks);
  const auto& kernels = LLMKERN_SELECT(mse_loss);
  for_ranges(N, [&](int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; i += kChunk)
      partial[i / kChunk] = kernels.sum(at(input, i, dtype), at(target, i, dtype), dtype, std::min(kChunk, N - i), dsum,
                                        at(dinput, i, dtype), at(dtarget, i, dtype), streams(N, dtype));
  });
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c];
  return sum;
}

void mse_loss_forward(const void* input, const void* target, DType dtype, int64_t N, void* out) {
  const auto& kernels = LLMKERN_SELECT(mse_loss);
  for_ranges(N, [&](int64_t i, int64_t n) {
    kernels.forward(at(input, i, dtype), at(target, i, dtype), dtype, n, at(out, i, dtype));
  });
}

void mse_loss_backward(const void* dloss, double dsum, const void* input, const void* target, DType dtype, int64_t N,
                       void* dinput, void* dtarget) {
  const auto& kernels = LLMKERN_SELECT(mse_loss);
  for_ranges(N, [&](int64_t i, int64_t n) {
    kernels.backward(at(dloss, i, dtype), dsum, at(input, i, dtype), at(target, i, dtype), dtype, n,
                     at(dinput, i, dtype), at(dtarget, i, dtype), streams(N, dtype));
  });
}

}  // namespace llmkern::cpu
