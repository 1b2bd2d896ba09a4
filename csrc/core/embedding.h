// Embedding lookup. See embedding.cpp for the idea and the traffic.
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

struct EmbeddingKernels {
  // out[d] = scale * sum_j rows[order[j] * D + d], j < count, added in order.
  void (*sum_rows)(const void* rows, DType dtype, int64_t D, const uint32_t* order, int64_t count, double scale,
                   void* out);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(EmbeddingKernels, embedding)
