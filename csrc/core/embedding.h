// Embedding lookup. See embedding.cpp for the idea and the traffic; the gradient is in table_gradient.h.
#pragma once
#include "core/dtype.h"
#include "core/indices.h"
#include "core/isa.h"

namespace llmkern::cpu {

// out[i] = weight[indices[i]].  weight (V, D), indices (N), out (N, D).
// Throws std::out_of_range, with torch's text, if an index is outside [0, V); nothing outside memory is read.
void embedding_forward(const void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, void* out);

// dweight[r] = sum of dout[i] over indices[i] == r, in order of i, in Accum<T>; other rows and padding_idx are zero.
// Every row of dweight (V, D) is written. padding_idx < 0: none. With scale_grad_by_freq a row's sum is divided by
// its count.
void embedding_backward(const void* dout, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N,
                        int64_t padding_idx, bool scale_grad_by_freq, void* dweight);

// Scales rows of weight (V, D) that are looked up and whose norm_type-norm exceeds max_norm down to it, as torch does:
// by max_norm / (norm + 1e-7). All indices are checked before anything is written.
void embedding_renorm(void* weight, DType dtype, int64_t V, int64_t D, Indices indices, int64_t N, double max_norm,
                      double norm_type);

struct EmbeddingKernels {
  // out[i] = weight[indices[i]] for i in [begin, end), row_bytes each; false if an index is outside [0, V).
  bool (*copy_rows)(const void* weight, int64_t V, int64_t row_bytes, Indices indices, int64_t begin, int64_t end,
                    int64_t N, bool stream, void* out);
  double (*norm)(const void* x, DType dtype, int64_t D, double norm_type);
  void (*scale)(void* x, DType dtype, int64_t D, double factor);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(EmbeddingKernels, embedding)
