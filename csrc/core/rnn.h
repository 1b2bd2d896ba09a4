// Recurrent layers: one layer, one direction, a whole sequence. See rnn.cpp for the idea and the FLOPs.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"
#include "core/util.h"

namespace llmkern::cpu {

// Gates G, in torch's order: lstm i, f, g, o; gru r, z, n; rnn one; slstm i, f, z, o.
enum class RnnMode : int { lstm, gru, rnn_tanh, rnn_relu, slstm };

// A layer's problem. Pointers are row-major and contiguous; T, B, H, P > 0 and I >= 0. A null pointer that may be null
// counts as zero. Tokens are the rows of x, y, gates and cells: (T, B), or (B, T), or those of a packed sequence.
struct Rnn {
  RnnMode mode;
  int64_t T, B, I, H, P;     // P: the width of h, H unless it is projected
  int64_t heads;             // diagonal blocks of W_hh: P / (its columns)
  DType dtype, state_dtype;  // of everything but states and what is said to be in Accum; of hx, cx, hy, cy
  bool reverse, batch_first;
  const int64_t* batch_sizes;         // (T), not increasing, the first at most B; null if the sequences are not packed
  const void *x, *hx, *cx;            // (tokens, I), (B, P), (B, C): see cells_of
  const void *weight_ih, *weight_hh;  // (G H, I), (G H, P / heads)
  const void *bias_ih, *bias_hh;      // (G H), may be null
  const void* weight_hr;              // (P, H), may be null: then P = H
  const void* peephole;               // (3, H): of c to i, f, o; may be null. lstm only
  const void* norms;                  // weights of layer-normalised cells, see rnn_norm.h; may be null
  double clip;                        // h is held within [-clip, clip]; 0: it is not. Not with weight_hr
  // How much of h and of c keeps its former value. In training each element is drawn, by `seed` and its place;
  // else the states are mixed in this proportion. Not with weight_hr.
  double zoneout_h, zoneout_c;
  bool draws;
  uint64_t seed;
};

static inline int64_t gates_of(RnnMode mode) {
  if (mode == RnnMode::gru) return 3;
  return mode == RnnMode::lstm || mode == RnnMode::slstm ? 4 : 1;
}
// C, the width of cell states beside h: c; for slstm c, n and m, side by side.
static inline int64_t cells_of(const Rnn& op) {
  if (op.mode == RnnMode::slstm) return 3 * op.H;
  return op.mode == RnnMode::lstm ? op.H : 0;
}
// Numbers per token and unit that a backward needs beside y: activated gates, and gru's W_hn h + b_hn, or slstm's
// sigmoid(f) beside the stabilised one. A plain Elman network needs none.
static inline int64_t saved_of(const Rnn& op) {
  if (op.mode == RnnMode::slstm) return 5;
  if (op.mode == RnnMode::lstm || op.mode == RnnMode::gru) return 4;
  return op.clip != 0 || op.zoneout_h != 0;
}
int64_t tokens_of(const Rnn& op);

// What the cells of a forward leave in memory. For a backward: gates (tokens, saved H); cells (tokens, C) and normed
// (tokens, see rnn_norm.h) in Accum; null if there will be none. cells may be wanted alone.
struct RnnOutputs {
  void *y, *hy, *cy;  // (tokens, P), (B, P), (B, C)
  void *gates = nullptr, *cells = nullptr, *normed = nullptr;
};
void rnn_forward(const Rnn& op, const RnnOutputs& out);

// The gradients that came for the outputs, and what the forward saved.
struct RnnCotangents {
  const void *dy, *dcells;  // (tokens, P), (tokens, C) in Accum; dcells may be null
  const void *dhy, *dcy;    // (B, P), (B, C)
  const void *y, *gates, *cells, *normed;
};

// Null where not wanted.
struct RnnGradients {
  void *dx, *dhx, *dcx;           // (tokens, I), (B, P), (B, C)
  void *dweight_ih, *dweight_hh;  // (G H, I), (G H, P / heads)
  void *dbias_ih, *dbias_hh;      // (G H)
  void *dweight_hr, *dpeephole;   // (P, H), (3, H)
  void* dnorms;                   // as norms
};
void rnn_backward(const Rnn& op, const RnnCotangents& given, const RnnGradients& out);

// A block of one step's work on units [u, u + units) of sequences [b, b + rows). The first is token `token`; from one
// sequence to the next are `stride` tokens, in every tensor of tokens.
struct RnnBlock {
  int rows;
  int64_t b, u, units, step, token, stride;
};

// `S` is Accum<dtype>, `A` the type of the operands of the products of the loop: S, or bf16.
struct RnnForwardArgs {
  const Rnn* op;
  DType operand;
  const void* gx;  // of this block: x W_ih^T + b in S, gx_ld numbers from one sequence to the next
  int64_t gx_ld;
  const void* hidden_bias;  // gru: b_hn (H) in S, or null
  void *h, *c;              // (B, P), (B, C): the states, in S
  void* next;               // (B, next_ld): h for the products of the next step (projected: h before it), in A
  int64_t next_ld;
  void *y, *gates, *cells;  // null if not wanted (projected: no y)
};

struct RnnBackwardArgs {
  const Rnn* op;
  DType operand;
  void *dh, *dc;  // (B, H), (B, C), in S: of h and c after this step; the parts that pass by the gates come back
  const void *dy, *dcells;  // null if there is none
  const void *y, *gates, *cells;
  // The states before the step, of the block's first sequence, and from one sequence to the next; in dtype and in S.
  const void *h_before = nullptr, *c_before = nullptr;
  int64_t h_stride = 0, c_stride = 0;
  void* dgates;       // (tokens, D) in A; see dgates_of
  void* unprojected;  // (tokens, H) in dtype: h before its projection; null if not wanted
  void* dpeephole;    // (rows, 3, H) in S, added up, row by row; null if not wanted
};

// Columns of dgates: those of the gates, in order; gru's are r dn, dr, dz, dn, so that both products find theirs side
// by side. Rows of pairs of bf16 are of even length.
static inline int64_t dgates_used(const Rnn& op) { return (op.mode == RnnMode::gru ? 4 : gates_of(op.mode)) * op.H; }
static inline int64_t dgates_of(const Rnn& op) { return dgates_used(op) + dgates_used(op) % 2; }

struct RnnKernels {
  int lanes_f32, lanes_f64;  // of a vector of float and of double
  int rows;                  // most rows of a product

  // to (rows, vectors, lanes) in S = (or += ) a (rows, K) times a panel (vectors, K, lanes). Panels are made by the
  // packing of core/gemm.h; `pairs` are those of bf16, and K then counts pairs.
  void (*product_f32)(int rows, int vectors, int64_t K, const void* a, int64_t lda, const void* panel, bool pairs,
                      bool accumulate, void* to);
  void (*product_f64)(int rows, int vectors, int64_t K, const void* a, int64_t lda, const void* panel, bool pairs,
                      bool accumulate, void* to);

  // The cell: `pre` are the sums of the recurrent product, (rows, G, lanes) (one gate: (rows, 1, 4 lanes)) in S.
  void (*forward)(const RnnForwardArgs& args, const RnnBlock& block, const void* pre);
  // Any number of units, and all that follows from their gates: dgates, dc, and the rest of dh.
  void (*backward)(const RnnBackwardArgs& args, const RnnBlock& block);

  // to (rows, n) = from, or +=, converted.
  void (*copy)(int64_t rows, int64_t n, View from, MutableView to, bool accumulate);
  // to (one row) = the sum of the rows of from, added in order: columns [begin, end).
  void (*sum_rows)(View from, int64_t rows, int64_t begin, int64_t end, MutableView to);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(RnnKernels, rnn)
