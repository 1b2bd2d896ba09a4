// Embedding lookup: forward copies rows, backward adds them up.
//
// Traffic. Forward: read and write N*D elements once. Backward: read N*D, write V*D once. No arithmetic to speak of, so
// both run at memory speed; the work is to touch each byte once and to be right about duplicates.
//
// Backward sorts the positions by row (stable radix sort of N 32-bit keys) and gives each run of equal rows to one
// thread, which adds it up in registers, in fp32, in the order of the batch: no atomics, the same bits for any number
// of threads. Rows without a gradient are zeroed on the way, so the output needs no memset before.
#include "core/embedding.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/row_order.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kGrainBytes = 32 * 1024;

int64_t grain_rows(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

}  // namespace

void embedding_forward(const void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, void* out) {
  const int64_t row_bytes = D * static_cast<int64_t>(itemsize(dtype));
  const char* from = static_cast<const char*>(weight);
  char* to = static_cast<char*>(out);
  std::atomic<bool> bad{false};
  parallel_for(N, grain_rows(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = indices[i];
      if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(V)) {
        bad.store(true, std::memory_order_relaxed);
        return;
      }
      std::memcpy(to + i * row_bytes, from + row * row_bytes, row_bytes);
    }
  });
  if (bad) throw_index_error();
}

void embedding_backward(const void* dout, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N,
                        int64_t padding_idx, bool scale_grad_by_freq, void* dweight) {
  const int64_t row_bytes = D * static_cast<int64_t>(itemsize(dtype));
  char* to = static_cast<char*>(dweight);
  const RowOrder sorted(indices, N, V);
  const uint32_t *rows = sorted.rows(), *starts = sorted.starts();
  const auto& kernels = LLMKERN_SELECT(embedding);
  // Each thread owns a range of the table: it zeroes the rows between runs and sums the runs.
  parallel_for(V, grain_rows(row_bytes), [&](int64_t begin, int64_t end) {
    int64_t r = std::lower_bound(rows, rows + sorted.runs(), static_cast<uint32_t>(begin)) - rows;
    int64_t next = begin;
    for (; r < sorted.runs() && rows[r] < end; ++r) {
      const int64_t row = rows[r], count = starts[r + 1] - starts[r];
      std::memset(to + next * row_bytes, 0, (row - next) * row_bytes);
      if (row == padding_idx)
        std::memset(to + row * row_bytes, 0, row_bytes);
      else
        kernels.sum_rows(dout, dtype, D, sorted.order() + starts[r], count, scale_grad_by_freq ? 1.0 / count : 1.0,
                         to + row * row_bytes);
      next = row + 1;
    }
    std::memset(to + next * row_bytes, 0, (end - next) * row_bytes);
  });
}

}  // namespace llmkern::cpu
