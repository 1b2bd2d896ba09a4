// Gradient clipping: the gradients are read once for the norm, and read and written once more only if they are too
// long.
//
// Both are one parallel region over all tensors (chunks.h). A chunk's sum is of a fixed order, and the
// sums of chunks are added in order: the same bits for any number of threads. Sums are in fp64, where no square of a
// fp32 number overflows or vanishes.
#include "core/grad_norm.h"

#include "core/chunks.h"
#include "core/util.h"

namespace llmkern::cpu {
double sum_of_squares(const std::vector<Span>& tensors) {
  const auto kernel = LLMKERN_SELECT(grad_norm).sum_of_squares;
  const TensorChunks chunks(tensors);
  std::vector<double> sums(chunks.count());
  chunks.parallel([&](const Span& tensor, int64_t begin, int64_t end, int64_t chunk) {
    sums[chunk] = kernel(at(tensor.data, begin, tensor.dtype), end - begin, tensor.dtype);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void scale(const std::vector<Span>& tensors, double factor) {
  const auto kernel = LLMKERN_SELECT(grad_norm).scale;
  TensorChunks(tensors).parallel([&](const Span& tensor, int64_t begin, int64_t end, int64_t) {
    kernel(at(tensor.data, begin, tensor.dtype), end - begin, tensor.dtype, factor);
  });
}

}  // namespace llmkern::cpu
