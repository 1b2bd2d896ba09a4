// Embedding lookup: forward copies rows, backward adds them up.
//
// Traffic. Forward: each row that occurs is read, N*D elements are written; the indices are checked on the way. The
// caches keep what they can of an output, since the next layer reads it; one far larger is written past them.
// Backward: see table_gradient.cpp.
#include "core/embedding.h"

#include <atomic>

#include "core/row_order.h"
#include "core/table_gradient.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
void embedding_forward(const void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, void* out) {
  const int64_t row_bytes = D * itemsize(dtype);
  const bool stream = N * row_bytes >= kLookupStreamBytes;
  const auto& kernels = LLMKERN_SELECT(embedding);
  std::atomic<bool> good{true};
  parallel_for(N, rows_in(kGrainBytes, row_bytes), [&](int64_t begin, int64_t end) {
    if (!kernels.copy_rows(weight, V, row_bytes, indices, begin, end, N, stream, out))
      good.store(false, std::memory_order_relaxed);
  });
  if (!good) throw_index_error();
}

void embedding_backward(const void* dout, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N,
                        int64_t padding_idx, bool scale_grad_by_freq, void* dweight) {
  const RowOrder order(indices, N, V);
  table_gradient({.rows = dout, .dtype = dtype, .D = D, .N = N, .source = order.order()}, order, V, padding_idx,
                 scale_grad_by_freq, dweight);
}

void embedding_renorm(void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, double max_norm,
                      double norm_type) {
  const RowOrder order(indices, N, V);
  const int64_t row_bytes = D * itemsize(dtype);
  const auto& kernels = LLMKERN_SELECT(embedding);
  parallel_for(order.runs(), rows_in(kGrainBytes, row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* const row = at(weight, order.rows()[r] * D, dtype);
      const double norm = kernels.norm(row, dtype, D, norm_type);
      if (norm > max_norm) kernels.scale(row, dtype, D, max_norm / (norm + 1e-7));
    }
  });
}

}  // namespace llmkern::cpu
