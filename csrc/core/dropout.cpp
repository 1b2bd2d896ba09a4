// Dropout whose mask is computed where it is needed, forward and backward, and never stored.
//
// Traffic: one read and one write; a stored mask would add a write and a read. About 25 instructions for a vector,
// where drawing from a sequential generator takes as many for one element, on one thread.
#include "core/dropout.h"

#include "core/threads.h"

namespace llmkern::cpu {

void dropout(const void* x, DType dtype, int64_t n, double p, uint64_t seed, void* y) {
  const auto& kernels = LLMKERN_SELECT(dropout);
  parallel_for(n, 1 << 14, [&](int64_t begin, int64_t end) { kernels.dropout(x, dtype, begin, end, p, seed, y); });
}

}  // namespace llmkern::cpu
