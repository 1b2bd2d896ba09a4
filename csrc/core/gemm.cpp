// Matrix product. 2 M N K FLOPs; the bar is the machine's FMA peak.
//
// B is packed once per block of columns, whole in k, by all threads; then each thread takes blocks of C from a queue,
// packs the rows of A that it needs and runs tiles of C that stay in registers over a block of k:
//
//   for columns of N, up to 8 MB of packed B           (in L3, shared)
//     for blocks of C                                  (the queue)
//       for blocks of k, up to 384                     (sums of one block stay in registers)
//         pack A: rows x k, up to half a megabyte      (in L2, the thread's own)
//         for panels of B, for panels of A: one tile   (b in L1, a from L2)
//
// Panels hold fp32 (fp64 for f64), whatever the operands are: conversion costs O(1/N) and O(1/M) of the work. Rows and
// columns are dealt out evenly (15 rows: 8 + 7, not 14 + 1). Up to one tile of rows, B is used where it lies.
#include "core/gemm.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>

#include "core/memory.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kDepth = 384;                  // of a block of k
constexpr int64_t kMaxDepth = 16 * kDepth;       // of packed B; more goes in several passes
constexpr int64_t kBlockBytes = 384 * 1024;      // of packed A
constexpr int64_t kPanelBytes = 8 << 20;         // of packed B
constexpr int64_t kBlockCols = 512;              // of a block of C, about
constexpr int64_t kSlack = 64;                   // elements that packing may write past its end
constexpr int64_t kWorkPerThread = 1 << 18;      // multiply-adds that are worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [0, n) in `count` parts of nearly equal length.
struct Split {
  int64_t n, count;
  int64_t operator[](int64_t i) const { return n * i / count; }
};
Split split(int64_t n, int64_t longest) { return {n, std::max<int64_t>(1, ceil_div(n, longest))}; }

// The calling thread's, kept for the next call.
template <class S>
S* workspace(int64_t n) {
  thread_local Buffer<S> buffer(0);
  thread_local int64_t size = 0;
  if (n > size) buffer = Buffer<S>(n), size = n;
  return buffer.get();
}

int threads_for(int64_t M, int64_t N, int64_t K) {
  if (omp_in_parallel()) return 1;
  const double worth = static_cast<double>(M) * static_cast<double>(N) * static_cast<double>(K) / kWorkPerThread;
  return static_cast<int>(std::clamp<double>(worth, 1, omp_get_max_threads()));
}

template <class S>
struct Problem {
  const GemmKernels<S>& kernels;
  int64_t M, N, K;
  Matrix A, B;  // B as (N, K): its transpose
  char* C;
  DType c_dtype;
  int64_t ldc;
  bool accumulate;

  char* c_at(int64_t i, int64_t j) const { return C + (i * ldc + j) * static_cast<int64_t>(itemsize(c_dtype)); }
};

// Rows [i0, i1) of columns [j0, j1): packs A, runs the tiles. `packed` is B's panel of columns from `origin`, or null
// where B is used as it lies. A result that is not of type S is summed in `sums` and converted at the end.
template <class S>
void block(const Problem<S>& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, const S* packed, int64_t origin, S* a,
           S* sums) {
  const auto& kernels = p.kernels;
  const int64_t cols = kernels.cols;
  const bool direct = itemsize(p.c_dtype) == sizeof(S);
  S* c = direct ? reinterpret_cast<S*>(p.c_at(i0, j0)) : sums;
  const int64_t ldc = direct ? p.ldc : j1 - j0;
  const Split rows = split(i1 - i0, kernels.rows), depths = split(p.K, kDepth);
  for (int64_t d = 0; d < depths.count; ++d) {
    const int64_t k = depths[d], depth = depths[d + 1] - k;
    const bool accumulate = d > 0 || (direct && p.accumulate);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int n = static_cast<int>(rows[r + 1] - rows[r]);
      kernels.pack(p.A, p.M, i0 + rows[r], n, k, depth, n, a + rows[r] * depth);
    }
    for (int64_t j = j0; j < j1; j += cols) {
      const int width = static_cast<int>(std::min(cols, j1 - j));
      const S* b = packed + (j - origin) * p.K + k * cols;
      for (int64_t r = 0; r < rows.count; ++r)
        kernels.tile(static_cast<int>(rows[r + 1] - rows[r]), width, depth, a + rows[r] * depth, b, cols,
                     c + rows[r] * ldc + (j - j0), ldc, accumulate);
    }
  }
  if (!direct)
    for (int64_t i = i0; i < i1; ++i)
      kernels.convert(sums + (i - i0) * ldc, ldc, p.c_at(i, j0), p.c_dtype, p.accumulate);
}

template <class S>
void run(const Problem<S>& p) {
  const auto& kernels = p.kernels;
  const int64_t rows = kernels.rows, cols = kernels.cols;
  const int threads = threads_for(p.M, p.N, p.K);
  // Columns whose packed panel fits the budget; whole tiles.
  const int64_t panels = ceil_div(p.N, cols);
  const int64_t budget = std::max<int64_t>(1, kPanelBytes / (std::max<int64_t>(1, p.K) * cols * static_cast<int64_t>(sizeof(S))));
  const Split outer = split(panels, budget);
  // Blocks of C: small enough for A's pack to stay in L2, and four or more for each thread where there are tiles.
  const int64_t depth = std::clamp<int64_t>(p.K, 1, kDepth);
  const int64_t most_rows = std::max<int64_t>(1, kBlockBytes / static_cast<int64_t>(sizeof(S)) / depth / rows) * rows;
  const int64_t widest = ceil_div(panels, outer.count);
  int64_t block_rows = std::min(most_rows, ceil_div(p.M, rows) * rows);
  int64_t block_panels = std::min(widest, kBlockCols / cols);
  const auto blocks = [&] { return ceil_div(p.M, block_rows) * ceil_div(widest, block_panels); };
  while (threads > 1 && blocks() < 4 * threads && (block_panels > 4 || block_rows > 4 * rows)) {
    if (block_panels * cols >= block_rows && block_panels > 4)
      block_panels = ceil_div(block_panels, 2);
    else if (block_rows > rows)
      block_rows = ceil_div(block_rows / rows, 2) * rows;
    else
      break;
  }
  const Split row_blocks = split(p.M, block_rows);
  const int64_t a_size = ceil_div(block_rows * depth + kSlack, 64) * 64;
  const int64_t sums_size = itemsize(p.c_dtype) == sizeof(S) ? 0 : block_rows * block_panels * cols;
  const int64_t own = ceil_div(a_size + sums_size, 64) * 64, shared = ceil_div(widest * cols * p.K, 64) * 64 + 64;
  S* const packed = workspace<S>(shared + threads * own);
#pragma omp parallel num_threads(threads)
  {
    S* const a = packed + shared + omp_get_thread_num() * own;
    for (int64_t o = 0; o < outer.count; ++o) {
      const int64_t first = outer[o], last = outer[o + 1], origin = first * cols;
#pragma omp for schedule(static)
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t j = panel * cols;
        kernels.pack(p.B, p.N, j, static_cast<int>(std::min(cols, p.N - j)), 0, p.K, static_cast<int>(cols),
                     packed + (j - origin) * p.K);
      }
      const Split col_blocks = split(last - first, block_panels);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < row_blocks.count * col_blocks.count; ++item) {
        const int64_t r = item / col_blocks.count, c = item % col_blocks.count;
        block(p, row_blocks[r], row_blocks[r + 1], (first + col_blocks[c]) * cols,
              std::min(p.N, (first + col_blocks[c + 1]) * cols), packed, origin, a, a + a_size);
      }
    }
  }
}

template <class S>
void gemm_in(const GemmKernels<S>& kernels, int64_t M, int64_t N, int64_t K, Matrix A, Matrix B, void* C,
             DType c_dtype, int64_t ldc, bool accumulate) {
  Problem<S> p{kernels, M, N, K, A, B, static_cast<char*>(C), c_dtype, ldc, accumulate};
  p.B.transposed = !B.transposed;
  if (K <= kMaxDepth) return run(p);
  // Deep products go in passes over k; a narrow result then needs a wide one to be summed in.
  const bool narrow = itemsize(c_dtype) != sizeof(S);
  const Buffer<S> wide(narrow ? M * N : 0);
  if (narrow)
    p.C = reinterpret_cast<char*>(wide.get()), p.ldc = N, p.accumulate = false,
    p.c_dtype = sizeof(S) == 4 ? DType::f32 : DType::f64;
  const Split passes = split(K, kMaxDepth);
  for (int64_t d = 0; d < passes.count; ++d) {
    const int64_t k = passes[d];
    const auto from = [k](Matrix X, bool along_rows) {
      const int64_t skip = k * (along_rows ? X.ld : 1) * static_cast<int64_t>(itemsize(X.dtype));
      X.data = static_cast<const char*>(X.data) + skip;
      return X;
    };
    Problem<S> pass = p;
    pass.K = passes[d + 1] - k;
    pass.A = from(p.A, p.A.transposed), pass.B = from(p.B, p.B.transposed);
    pass.accumulate = d > 0 || p.accumulate;
    run(pass);
  }
  if (narrow)
    for (int64_t i = 0; i < M; ++i)
      kernels.convert(wide.get() + i * N, N, static_cast<char*>(C) + i * ldc * static_cast<int64_t>(itemsize(c_dtype)),
                      c_dtype, accumulate);
}

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, Matrix A, Matrix B, void* C, DType c_dtype, int64_t ldc, bool accumulate) {
  const bool wide = A.dtype == DType::f64;
  if (wide != (B.dtype == DType::f64) || wide != (c_dtype == DType::f64))
    throw std::invalid_argument("gemm: float64 cannot be mixed with other dtypes; convert the operands first");
  if (M <= 0 || N <= 0) return;
  const auto& table = LLMKERN_SELECT(gemm);
  if (wide)
    gemm_in(table.f64, M, N, K, A, B, C, c_dtype, ldc, accumulate);
  else
    gemm_in(table.f32, M, N, K, A, B, C, c_dtype, ldc, accumulate);
}

}  // namespace llmkern::cpu
