// C = A B or C += A B, for any mix of fp32, bf16 and fp16, and for fp64. See gemm.cpp for the idea.
#pragma once
#include "core/dtype.h"
#include "core/isa.h"
#include "core/util.h"

namespace llmkern::cpu {

// Row-major with leading dimension ld; transposed: the operand is the transpose of what lies in memory.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t ld;
  bool transposed = false;
};

// C (M, N) = A (M, K) B (K, N), or += if accumulate. Sums are taken in fp32 (fp64 for
// f64), in an order that depends on the sizes alone: the same bits for any number of threads. They start from `bias`
// (N), fp32 (fp64), where there is one, and then C is not accumulated. Opens its own parallel region; inside another
// one it runs on the calling thread. Throws std::invalid_argument if f64 meets another dtype.
void gemm(int64_t M, int64_t N, int64_t K, Matrix A, Matrix B, MutableView C, bool accumulate,
          const void* bias = nullptr);

// Whether products of two bf16 matrices are taken by the CPU's own instruction, twice as fast as in fp32.
bool gemm_multiplies_bf16();

// to (n), of dtype, = from (n), fp32 (fp64 for f64).
void convert(const void* from, int64_t n, void* to, DType dtype);

// The inner loops, for sums in S = float or double. A panel's element is one number in S, or (`step` 2) a pair of bf16
// that follow each other in k: then a block of k is `depth` numbers, but half as many steps of a tile.
template <class S>
struct GemmKernels {
  int step;
  int rows, cols;  // the largest tile
  int wide;        // columns of a tile of a single row, in addition

  // One panel: to[k * stride + i] = X[first + i][k0 + k], i < n, k < depth, X the matrix (extent, *), or its
  // transpose (see Matrix). What is written at n..stride is of no account; up to a vector's worth may be
  // written past the panel's end.
  void (*pack)(Matrix X, int64_t extent, int64_t first, int n, int64_t k0, int64_t depth, int stride, S* to);

  // c (rows, cols) = sum over k < steps of a[k * rows + i] b[k * ldb + j], or +=. Sums start from
  // start (cols), or from 0 if it is null. Reads b up to a whole vector.
  void (*tile)(int rows, int cols, int64_t steps, const S* a, const S* b, int64_t ldb, S* c, int64_t ldc,
               const S* start, bool accumulate);

  // to[k] = X[i][k], k < depth, in S, or in bf16 where panels hold pairs; writes up to a vector past the end.
  void (*line)(Matrix X, int64_t i, int64_t depth, void* to);

  // c (rows, lines) = inner products of rows of a, in the type of `line`, with lines of b (lines, depth), or +=. Pairs:
  // of bf16.
  void (*dots)(int rows, int64_t lines, int64_t depth, const void* a, int64_t lda, View b, S* c, int64_t ldc,
               bool accumulate);

  // to (n) = from (n) in another dtype, or +=.
  void (*convert)(const S* from, int64_t n, void* to, DType dtype, bool accumulate);
};

struct GemmTable {
  GemmKernels<float> f32;
  GemmKernels<double> f64;
  GemmKernels<float> pairs;  // of bf16; empty where there is no such instruction
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(GemmTable, gemm)
