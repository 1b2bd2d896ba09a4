// Embedding lookup: forward copies rows, backward adds them up.
//
// Traffic. Forward: each row that occurs is read, N*D elements are written; the indices are checked on the way. The
// caches keep what they can of an output, since the next layer reads it; one far larger is written past them.
// Backward: see table_gradient.cpp.
#include "core/embedding.h"

#include <algorithm>
#include <atomic>

#include "core/row_order.h"
#include "core/table_gradient.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kGrainBytes = 32 * 1024;
constexpr int64_t kStreamBytes = int64_t{32} << 20;

int64_t grain_rows(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

}  // namespace

void embedding_forward(const void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, void* out) {
  const int64_t row_bytes = D * static_cast<int64_t>(itemsize(dtype));
  const bool stream = N * row_bytes >= kStreamBytes;
  const auto& kernels = LLMKERN_SELECT(embedding);
  std::atomic<bool> good{true};
  parallel_for(N, grain_rows(row_bytes), [&](int64_t begin, int64_t end) {
    if (!kernels.copy_rows(weight, V, row_bytes, indices, begin, end, N, stream, out))
      good.store(false, std::memory_order_relaxed);
  });
  if (!good) throw_index_error();
}

void embedding_backward(const void* dout, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N,
                        int64_t padding_idx, bool scale_grad_by_freq, void* dweight) {
  const RowOrder order(indices, N, V);
  table_gradient({dout, dtype, D, N, order.order()}, order, V, padding_idx, scale_grad_by_freq, dweight);
}

void embedding_renorm(void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, double max_norm,
                      double norm_type) {
  const RowOrder order(indices, N, V);
  const int64_t row_bytes = D * static_cast<int64_t>(itemsize(dtype));
  const auto& kernels = LLMKERN_SELECT(embedding);
  parallel_for(order.runs(), grain_rows(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* const row = static_cast<char*>(weight) + order.rows()[r] * row_bytes;
      const double norm = kernels.norm(row, dtype, D, norm_type);
      if (norm > max_norm) kernels.scale(row, dtype, D, max_norm / (norm + 1e-7));
    }
  });
}

}  // namespace llmkern::cpu
