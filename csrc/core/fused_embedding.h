// Lookup, positions, norm and dropout in one pass. See fused_embedding.cpp for the idea and the traffic.
#pragma once
#include "core/dtype.h"
#include "core/embedding.h"
#include "core/isa.h"

namespace llmkern::cpu {

enum class Norm { none, layer, rms };

// A summand: row indices[n % period] of data (rows, D) for token n. Absent if period is 0.
struct FusedTable {
  const void* data;
  int64_t rows;
  Indices indices;
  int64_t period;

  int64_t row(int64_t n) const { return indices[n % period]; }
};

// out[n] = dropout(norm(scale * tables[0] + tables[1] + tables[2])), tables at their rows: tokens, positions, token
// types.
//   layer: (s - mean) / sqrt(var + eps) * weight + bias     rms: s / sqrt(mean(s^2) + eps) * weight + bias
// norm_weight, norm_bias (D), or null. An element of out (N, D) is dropped with probability p, by seed and its index.
struct FusedEmbedding {
  DType dtype;
  int64_t N, D;
  FusedTable tables[3];
  double scale;
  Norm norm;
  const void *norm_weight, *norm_bias;
  double eps, p;
  uint64_t seed;
};

// With a norm, stats (N, 2) becomes each row's mean (rms: 0) and 1 / deviation, in Accum<T>; else it is not written.
// Throws std::out_of_range if an index is outside its table, with torch's text, before anything is written.
void fused_embedding_forward(const FusedEmbedding& op, void* out, void* stats);

// Where gradients go, each of its operand's shape and wholly written; null: not wanted. Padding and frequency are the
// tokens', as for embedding_backward.
struct FusedEmbeddingGradients {
  void* tables[3];
  void *norm_weight, *norm_bias;
  int64_t padding_idx;
  bool scale_grad_by_freq;
};

// For dout (N, D) and the forward's stats. Without a norm the tables' data is not read.
void fused_embedding_backward(const FusedEmbedding& op, const void* dout, const void* stats,
                              const FusedEmbeddingGradients& to);

// A token's rows in the tables, null where there is none, and the next token's in the first.
struct FusedRows {
  const void *at[3], *next;
};

// One token n each. `scratch` holds 2 * D of Accum<T>.
struct FusedEmbeddingKernels {
  void (*forward)(const FusedEmbedding& op, int64_t n, const FusedRows& rows, void* out, void* stats, void* scratch);
  // dsum (D), unless null, becomes the gradient at the sum. sums (2, D), unless null, of Accum<T>, are increased by the
  // token's part of the gradients of norm_weight and norm_bias.
  void (*backward)(const FusedEmbedding& op, int64_t n, const FusedRows& rows, const void* dout, const void* stats,
                   void* dsum, void* sums, void* scratch);
  // out[d] = sum of sums[i * stride + d] over i < count, in order, for d < D; sums are of Accum<T>.
  void (*add_up)(const void* sums, int64_t count, int64_t stride, int64_t D, DType dtype, void* out);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(FusedEmbeddingKernels, fused_embedding)
