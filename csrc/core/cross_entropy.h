// Cross-entropy from logits. See cross_entropy.cpp for the idea and the traffic.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"
#include "core/util.h"

namespace llmkern::cpu {

// What one call shares between its rows. With z = cap(logit_scale * x), cap(u) = softcap * tanh(u / softcap), and e the
// label smoothing, a row's loss is
//   index y:          (1 - e) w[y] (lse(z) - z[y]) + sum_c u[c] (lse(z) - z[c]) + z_loss lse(z)^2,  u = w e / V
//   probabilities t:                                 sum_c u[c] (lse(z) - z[c]) + z_loss lse(z)^2,  u = w (t (1 - e) +
//   e / V)
struct CrossEntropy {
  int64_t N, V, D;            // logits (N, V, D): N * D rows of V classes
  DType dtype;                // of logits
  const int64_t* target;      // (N, D); null if there are
  const void* probabilities;  // (N, V, D)
  DType target_dtype;
  const void* weight;  // (V), or null for ones
  DType weight_dtype;
  int64_t ignore_index;                                  // of index targets only
  double label_smoothing, z_loss, softcap, logit_scale;  // softcap 0: none
};

// (N, D), in Accum of the logits' dtype; null where not wanted. Ignored rows give 0, and -1 for argmax.
struct CrossEntropyOutputs {
  void *loss, *lse, *entropy;  // entropy of softmax(z), in nats
  int64_t* argmax;             // the first of the largest z; that of NaN if there is one
};

// (N, D), in Accum: the gradients that came for the outputs. Null: none.
struct CrossEntropyCotangents {
  const void *loss = nullptr, *lse = nullptr, *entropy = nullptr;
};

// dlogits (N, V, D) have the dtype of the logits, or bf16 for logits in f32. They may be the logits themselves: then
// each row begins where its logits did, if D is 1 or the dtypes are the same. dtarget (N, V, D) is of target_dtype.
// Null where not wanted.
struct CrossEntropyGradients {
  void* dlogits;
  DType dtype;
  void* dtarget;
};

// Everything in one pass over the logits: outputs, and gradients for the cotangents that are given. The bits depend on
// neither the number of threads nor on what else is asked for. Checks the targets, with torch's text, before anything
// is written.
void cross_entropy(const CrossEntropy& op, const void* logits, const CrossEntropyOutputs& outputs,
                   const CrossEntropyCotangents& cotangents, const CrossEntropyGradients& gradients);

// Throws std::out_of_range if a target is neither ignore_index nor in [0, V).
void check_targets(const CrossEntropy& op);

// Of a block of a row: max z; with base = max, or 0 if that is -inf: sum of e = exp(z - base), of u, of u (z - base),
// and of e (z - base).
struct CrossEntropyPart {
  double max, base, sum, total, weighted, entropy;
};

// What turns a block's e into its gradients:
//   dz = s (softmax - entropy (z - m)) - loss u, s = e p the softmax of z; at the target, own of `softmax` goes with s
//   - 1 dt = loss keep w (m + log_sum - z)
struct CrossEntropyFactors {
  double p, softmax, entropy, loss;
  double uniform;  // u, where there is no array of it
  double m, log_sum, own, keep;
};

// What to write for n <= kCrossEntropyBlock logits x. y: the target's place among them, or -1. e: what reduce left. u
// and w as there, w null for ones. dx, or dt, or both.
struct CrossEntropyBlockGradient {
  CrossEntropyFactors k;
  const void *x, *u, *w, *e;
  int64_t n, y;
  void* dx;
  DType dx_dtype;
  bool stream;  // past the caches
  void* dt;
};

struct CrossEntropyKernels {
  // u = w (t keep + uniform), n elements; t null: zeros, w null: ones. t of `dtype`, w and u in Accum.
  void (*targets)(const void* t, DType dtype, const void* w, double keep, double uniform, int64_t n, void* u);
  // A block of n <= kCrossEntropyBlock logits; u null: `uniform`. e (n, Accum) may be null. `meanwhile`, if not null:
  // the gradient of as many logits of another row, which is written between the exponentials.
  void (*reduce)(const CrossEntropy& op, const void* x, const void* u, double uniform, int64_t n, bool entropy, void* e,
                 CrossEntropyPart* part, const CrossEntropyBlockGradient* meanwhile);
  void (*gradient)(const CrossEntropy& op, const CrossEntropyBlockGradient& block);
  // The first z that equals `value` or is NaN, or -1.
  int64_t (*find)(const CrossEntropy& op, const void* x, int64_t n, double value);
  // z[0], in double.
  double (*logit)(const CrossEntropy& op, const void* x);
  // to (cols, rows) = from (rows, cols)^T, converted.
  void (*transpose)(View from, int64_t rows, int64_t cols, MutableView to);
};

// Elements of a row that are taken together: the logits and their exponentials stay in the first-level cache.
inline constexpr int64_t kCrossEntropyBlock = 2048;

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(CrossEntropyKernels, cross_entropy)
