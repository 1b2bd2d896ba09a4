// Layer-normalised cells (Ba et al., 2016): a = norm(W x) w_ih + b_ih and r = norm(U h) w_hh + b_hh, each over all
// gates of a sequence, and lstm's h of norm(c) w_c + b_c.
//
// A step needs all gates of a row before its first unit is known, so threads share sequences alone, and a step's
// products go to memory, where the cell finds them in L2. Bytes: both products are read and written once more than in
// an ordinary cell; for a backward they are kept, normalised, in S.
#pragma once
#include "core/rnn.h"

namespace llmkern::cpu {

// Numbers of a token in `normed`: W x and U h, normalised, (G H) each, and the reciprocals of their deviations.
static inline int64_t normed_of(const Rnn& op) { return op.norms ? 2 * gates_of(op.mode) * op.H + 2 : 0; }
// Numbers in `norms`: w_ih and w_hh, (G H) each, and of an lstm w_c and b_c, (H) each.
static inline int64_t norms_of(const Rnn& op) {
  return 2 * gates_of(op.mode) * op.H + (op.mode == RnnMode::lstm ? 2 * op.H : 0);
}

// Of a block's sequences. Everything is in S, `ld` numbers from one sequence to the next.
struct RnnNormArgs {
  const void *norms, *bias;  // bias (G H): what is added to all but gru's W_hn h
  const void* input;         // W x, normalised
  int64_t input_ld;
  void* hidden;  // U h; comes back normalised
  int64_t hidden_ld;
  void* deviation;  // where the reciprocal of that of U h goes; null if it is not wanted
  int64_t deviation_ld;
  void* scratch;  // (2, H)
};

struct RnnNormBackwardArgs {
  const void* norms;
  const void* normed;       // (tokens, normed_of)
  void* dhidden;            // (tokens, dhidden_of) in A: the gradients of U h
  void* dnorm_c;            // (B, 2, H) in S, added up, row by row: of w_c and b_c
  void* scratch = nullptr;  // (dgates_of + 3 H) in S
};

static inline int64_t dhidden_of(const Rnn& op) {
  const int64_t columns = gates_of(op.mode) * op.H;
  return columns + columns % 2;
}

struct RnnNormKernels {
  // Rows of x (rows, n) in S, normalised in place. The reciprocals of their deviations go to `deviation`, unless that
  // is null; they are as far apart as the rows.
  void (*normalise)(int64_t rows, int64_t n, MutableView x, void* deviation);
  // A step of all units of the block's sequences. `args.gx` is not read.
  void (*forward)(const RnnForwardArgs& args, const RnnNormArgs& norm, const RnnBlock& block);
  // The same backward, with dgates those of the sums.
  void (*backward)(const RnnBackwardArgs& args, const RnnNormBackwardArgs& norm, const RnnBlock& block);
  // Of some tokens: the columns of dgates that belong to W x become the gradients of W x. What parameters get of them
  // is added to `sums` (2 G H + D) in S, unless it is null: the gradients of w_ih and w_hh, and the columns of dgates.
  void (*input)(const Rnn& op, DType operand, int64_t rows, void* dgates, const void* normed, const void* norms,
                void* sums);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(RnnNormKernels, rnn_norm)
