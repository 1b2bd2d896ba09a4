// Recurrent layers: one layer, one direction, a whole sequence. See rnn.cpp for the idea and the FLOPs.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"

namespace llmkern::cpu {

// An LSTM layer's problem. Pointers are row-major and contiguous; T, B, H > 0 and I >= 0. Gates stand in the order
// i, f, g, o. A null bias counts as zero.
struct Lstm {
  int64_t T, B, I, H;
  DType dtype;  // of everything but cells and what is said to be in Accum
  bool reverse;
  const void *x, *hx, *cx;            // (T, B, I), (B, H), (B, H)
  const void *weight_ih, *weight_hh;  // (4H, I), (4H, H)
  const void *bias_ih, *bias_hh;      // (4H)
};

// y (T, B, H), hy and cy (B, H). For a backward: gates (T, B, 4H), activated, and cells (T, B, H) in Accum; null if
// there will be none.
void lstm_forward(const Lstm& op, void* y, void* hy, void* cy, void* gates, void* cells);

// Gradients from dy (T, B, H), dhy, dcy (B, H) and what the forward saved. Null outputs are not computed.
struct LstmGradients {
  void *dx, *dhx, *dcx;           // (T, B, I), (B, H), (B, H)
  void *dweight_ih, *dweight_hh;  // (4H, I), (4H, H)
  void* dbias;                    // (4H): the gradient of either bias
};
void lstm_backward(const Lstm& op, const void* dy, const void* dhy, const void* dcy, const void* y, const void* gates,
                   const void* cells, const LstmGradients& out);

// One thread's share: the batch rows [begin, end) through all of time. Rows never meet, so that threads need no
// barrier. `S` below is Accum<dtype>.
struct LstmForwardRows {
  const Lstm* op;
  const void* gx;      // (T, B, 4H) in S: x W_ih^T
  const void* packed;  // W_hh, see rnn.cpp
  void *y, *hy, *cy, *gates, *cells;
  void* state;  // scratch of this thread: 3 (end - begin) H in S
  int64_t begin, end;
};
struct LstmBackwardRows {
  const Lstm* op;
  const void *dy, *dhy, *dcy, *gates, *cells;
  const void* packed;  // W_hh, see rnn.cpp
  void* dgates;        // (T, B, 4H) in S
  void *dhx, *dcx;
  void* state;  // scratch of this thread: 2 (end - begin) H in S
  int64_t begin, end;
};

struct RnnKernels {
  // Lanes of one vector of float and of double: the width of a column of a panel.
  int lanes_f32, lanes_f64;
  // One panel of 4 vectors of columns of a (K, *) matrix whose element (k, n) lies at w[k * stride_k + n * stride_n]:
  // to[k][j][l] = element (k, start[j] + l) for l < valid[j], else 0.
  void (*pack)(const void* w, DType dtype, int64_t K, int64_t stride_k, int64_t stride_n, const int64_t (&start)[4],
               const int64_t (&valid)[4], void* to);
  void (*lstm_forward)(const LstmForwardRows& rows);
  void (*lstm_backward)(const LstmBackwardRows& rows);
  // to (n) = sum of rows of from (rows, n) in S, added in order, as dtype.
  void (*sum_rows)(const void* from, DType dtype, int64_t rows, int64_t n, int64_t begin, int64_t end, void* to);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(RnnKernels, rnn)
