// Layer normalisation, and its root-mean-square form. See layer_norm.cpp for the idea and the traffic.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

struct LayerNorm {
  DType dtype;   // of x, y and their gradients
  DType affine;  // of weight and bias and their gradients: dtype, or f32 where dtype has 16 bits
  int64_t N, D;
  const void* x;       // (N, D)
  const void* weight;  // (D), or null: ones
  const void* bias;    // (D), or null: zeros
  double eps;
  bool rms;
};

// y (N, D); stats (N, 2), in the accumulation dtype: each row's mean (0 with rms) and 1 / deviation.
void layer_norm_forward(const LayerNorm& op, void* y, void* stats);

// Any of them may be null.
struct LayerNormGradients {
  void* x;       // (N, D)
  void* weight;  // (D)
  void* bias;    // (D)
};

// stats: what the forward gave.
void layer_norm_backward(const LayerNorm& op, const void* dy, const void* stats, const LayerNormGradients& to);

// The same on the rows [begin, end). weight and bias are in the accumulation dtype here. `stream`: rows go past the
// caches.
struct LayerNormKernels {
  void (*forward)(const LayerNorm& op, int64_t begin, int64_t end, void* y, void* stats, bool stream);
  // Adds these rows' part to the weight's and the bias' gradient, which are in the accumulation dtype.
  void (*backward)(const LayerNorm& op, int64_t begin, int64_t end, const void* dy, const void* stats,
                   const LayerNormGradients& to, bool stream);
  // out[d] = v[d], n numbers, in the accumulation dtype.
  void (*widen)(const void* v, DType dtype, int64_t n, void* out);
  // out[d] = the sum of parts[i * stride + d] over i < count, in this order, for n columns.
  void (*add_up)(const void* parts, int64_t count, int64_t stride, int64_t n, DType dtype, void* out);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(LayerNormKernels, layer_norm)
