// The gradient of a table whose rows were looked up: sums of gradient rows, one for each table row that occurs. See
// table_gradient.cpp.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

class RowOrder;

// Terms of sums, in the order of a RowOrder: term j is scale[j] * rows[source[j]].
struct Terms {
  const void* rows;  // (S, D)
  DType dtype;
  int64_t D, N;
  const uint32_t* source;              // (N)
  const void* scale = nullptr;         // (N) of Accum; null: 1
  const int32_t* largest = nullptr;    // (S, D); given, term j has only columns d where largest[source[j], d] is
  const uint32_t* position = nullptr;  // position[j] (N)
};

// dweight[r] = sum of the terms of row r's run, in order, in Accum; other rows and padding_idx are zero. Every row of
// dweight (V, D) is written. padding_idx < 0: none. With scale_grad_by_freq a sum is divided by its count.
void table_gradient(const Terms& terms, const RowOrder& order, int64_t V, int64_t padding_idx, bool scale_grad_by_freq,
                    void* dweight);

// The same for the rows that occur, but padding_idx: their numbers, ascending, and their sums. The caller's arrays
// hold table_gradient_rows() of them.
int64_t table_gradient_rows(const RowOrder& order, int64_t padding_idx);
void table_gradient_compact(const Terms& terms, const RowOrder& order, int64_t padding_idx, int64_t* rows,
                            void* values);

struct TableGradientKernels {
  // out (D) = scale * sum of terms [begin, end), of out_dtype: that of the terms, or either is Accum of the other.
  void (*sum)(const Terms& terms, int64_t begin, int64_t end, double scale, bool stream, DType out_dtype, void* out);
  // Zeros past the caches.
  void (*zero)(void* p, size_t bytes);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(TableGradientKernels, table_gradient_kernels)
