// Traffic of a lookup: N rows of 1 or 1/2 byte an element and 8 bytes beside, read once; N*D elements written once. The
// table is a quarter or an eighth of one in fp32, so that it, or more of its frequent rows, stays in the caches.
//
// Quantising reads the table twice (the second time from the caches: row by row) and works in fp64, so that what it
// rounds is the result alone.
#include "core/quantized_embedding.h"

#include <algorithm>
#include <atomic>

#include "core/row_order.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kAheadBytes = 4 * 1024;

}  // namespace

void quantize_rows(const void* weight, DType dtype, int64_t V, int64_t D, int bits, uint8_t* data, float* scale,
                   float* offset) {
  const int64_t bytes = D * itemsize(dtype);
  const int64_t packed =
      QuantizedTable{.data = nullptr, .scale = nullptr, .offset = nullptr, .V = V, .D = D, .bits = bits}.row_bytes();
  const auto& kernels = LLMKERN_SELECT(quantized_embedding);
  parallel_for(V, rows_in(kGrainBytes, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels.quantize(at(weight, r * D, dtype), dtype, D, bits, data + r * packed, scale + r, offset + r);
  });
}

void quantized_embedding_forward(const QuantizedTable& table, Indices indices, int64_t N, DType dtype, void* out) {
  const int64_t bytes = table.D * itemsize(dtype), packed = table.row_bytes();
  const int64_t step = kAheadBytes / (packed + 1) + 1;
  const auto& kernels = LLMKERN_SELECT(quantized_embedding);
  const bool stream = N * bytes >= kStreamBytes;
  const auto inside = [&](int64_t row) { return static_cast<uint64_t>(row) < static_cast<uint64_t>(table.V); };
  std::atomic<bool> good{true};
  parallel_for(N, rows_in(kGrainBytes, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = indices[i], next = indices[std::min(i + step, N - 1)], ahead = inside(next) ? next : row;
      if (!inside(row)) return good.store(false, std::memory_order_relaxed);
      __builtin_prefetch(table.scale + ahead);
      __builtin_prefetch(table.offset + ahead);
      kernels.dequantize(table.data + row * packed, table.data + ahead * packed, table.D, table.bits, table.scale[row],
                         table.offset[row], stream, dtype, at(out, i * table.D, dtype));
    }
  });
  if (!good) throw_index_error();
}

}  // namespace llmkern::cpu
