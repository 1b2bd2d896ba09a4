// Cross-entropy from logits. See cross_entropy.cpp for the idea and the traffic.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// What one call shares between its rows. With z = cap(logit_scale * x), cap(u) = softcap * tanh(u / softcap):
//   loss = (1 - e) w[y] (lse(z) - z[y]) + (e / V) sum_c w[c] (lse(z) - z[c]) + z_loss lse(z)^2
struct CrossEntropy {
  int64_t N, V;
  DType dtype;         // of logits, weight and dlogits
  const void* weight;  // (V), or null for ones
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;  // softcap 0: none
};

// loss (N) and stats (N, 2), in Accum: stats holds max(z) and sum(exp(z - max)) of each row, so that lse = max +
// log(sum). With scale (N, Accum) not null, dlogits (N, V) = scale * dloss/dlogits is written in the same pass over the
// row. Ignored rows give loss 0, gradient 0 and stats (0, 1). Throws std::out_of_range, with torch's text, if a target
// is neither ignore_index nor in [0, V).
void cross_entropy_forward(const CrossEntropy& op, const void* logits, const int64_t* target, const void* scale,
                           void* loss, void* stats, void* dlogits);

// dlogits = dloss * d loss / d logits, from the stats of the forward: bit for bit what the forward
// would have written with scale = dloss.
void cross_entropy_backward(const CrossEntropy& op, const void* dloss, const void* logits, const int64_t* target,
                            const void* stats, void* dlogits);

struct CrossEntropyKernels {
  // One row. `scratch`: V elements of Accum. `scale`: null, or what the gradient is multiplied by.
  void (*forward)(const CrossEntropy& op, const void* x, int64_t y, double weight_sum, const void* scale, void* loss,
                  void* stats, void* dx, void* scratch, bool stream);
  void (*backward)(const CrossEntropy& op, const void* x, int64_t y, double weight_sum, const void* dloss,
                   const void* stats, void* dx, bool stream);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(CrossEntropyKernels, cross_entropy)
