// Matrix product. 2 M N K FLOPs; the bar is the machine's FMA peak (bf16: its dot-product peak).
//
// B is packed once per block of columns and pass over k, by all threads; then each thread takes blocks of C from a
// queue, packs the rows of A that it needs and runs tiles of C that stay in registers over a block of k:
//
//   for passes over k                                  (few products are that deep)
//     for columns of N, up to 8 MB of packed B         (in L3, shared)
//       for blocks of C                                (the queue)
//         for blocks of k, up to 384                   (sums of one block stay in registers)
//           pack A: rows x k, up to half a megabyte    (in L2, the thread's own)
//           for panels of B, for panels of A: one tile (b in L1 or L2, a from L2)
//
// Panels hold fp32 (fp64 for f64), whatever the operands are: conversion costs O(1/N) and O(1/M) of the work. Two bf16
// operands are packed in pairs, where the CPU multiplies those. Rows are dealt out evenly (15 rows: 8 + 7, not 14 + 1).
// The blocks of k, and so the order of every sum, depend on K alone. Few rows take other ways, below.
#include "core/gemm.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/memory.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kDepth = 512;              // of a block of k, in steps of a tile
constexpr int64_t kPassBlocks = 24;          // of k in one pass, which packs B
constexpr int64_t kFlatElements = 1 << 20;   // of A in one pass, which packs A
constexpr int64_t kDotDepth = 1024;          // of a block of k for inner products, whose sums are spread over lanes
constexpr int64_t kBlockBytes = 512 * 1024;  // of packed A
constexpr int64_t kPanelBytes = 8 << 20;     // of packed B
constexpr int64_t kBlockCols = 1024;         // of a block of C, about
constexpr int64_t kBlocksPerThread = 6;      // of C
constexpr int64_t kLeastTiles = 3;           // of rows in one of them, if columns can be split
constexpr int64_t kSlack = 16;               // elements that packing may write past its end
constexpr int64_t kConvertGrain = 1 << 15;   // elements that are worth a thread
constexpr int64_t kWorkPerThread = 1 << 18;  // multiply-adds that are worth a thread

int64_t round_up(int64_t n) { return ceil_div(n, 64) * 64; }

// [0, n) in `count` parts of nearly equal length.
struct Split {
  int64_t n, count;
  int64_t operator[](int64_t i) const { return n * i / count; }
};
Split split(int64_t n, int64_t longest) { return {.n = n, .count = std::max<int64_t>(1, ceil_div(n, longest))}; }

// The calling thread's, kept for the next call.
template <class S>
S* workspace(int64_t n) {
  thread_local Buffer<S> buffer(0);
  thread_local int64_t size = 0;
#if defined(LLMKERN_SANITIZE)
  // No longer than what was asked for, so that what lies past its end is seen.
  size = 0;
#endif
  if (n > size) {
    buffer = Buffer<S>(n);
    size = n;
  }
  return buffer.get();
}

int threads_for(int64_t M, int64_t N, int64_t K) {
  const double worth = static_cast<double>(M) * static_cast<double>(N) * static_cast<double>(K) / kWorkPerThread;
  return static_cast<int>(std::clamp<double>(worth, 1, threads_of_region()));
}

// A block of k: `depth` numbers from `first` on; `steps` elements of a panel, `at` from where the pass over k begins.
struct Depth {
  int64_t first, depth, at, steps;
};

template <class S>
struct GemmProblem {
  const GemmKernels<S>& kernels;
  int64_t M, N, K;
  Matrix A, B;  // B as (N, K): its transpose
  MutableView C;
  bool accumulate;
  const S* bias;
  int64_t d0 = 0, d1 = depths().count;  // the blocks of k of this pass

  Split rows() const { return split(M, kernels.rows); }
  Split depths() const { return split(ceil_div(K, kernels.step), kDepth); }
  Depth depth(int64_t begin, int64_t end) const {
    const int64_t step = depths()[begin], steps = depths()[end] - step, k = step * kernels.step;
    return {k, std::min(K - k, steps * kernels.step), step - depths()[d0], steps};
  }
  Depth depth(int64_t d) const { return depth(d, d + 1); }
  Depth pass() const { return depth(d0, d1); }
  int64_t longest() const { return std::clamp<int64_t>(ceil_div(K, kernels.step), 1, kDepth); }  // steps of a block
  DType own() const { return sizeof(S) == 4 ? DType::f32 : DType::f64; }
  bool narrow() const { return C.dtype != own(); }
  char* c_at(int64_t i, int64_t j) const { return at(C.data, i * C.ld + j, C.dtype); }
};

// Where a block of C is summed: C itself, or scratch if C's type is narrower than S.
template <class S>
struct BlockSums {
  const GemmProblem<S>& p;
  int64_t i0, i1, j0, j1, ld;
  S* at;
  bool direct, accumulate;

  BlockSums(const GemmProblem<S>& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, S* scratch)
      : p(p), i0(i0), i1(i1), j0(j0), j1(j1), direct(!p.narrow()) {
    ld = direct ? p.C.ld : j1 - j0;
    at = direct ? reinterpret_cast<S*>(p.c_at(i0, j0)) : scratch;
    accumulate = direct && p.accumulate;
  }
  // What the sums of columns [j, ...) start from in block d of k.
  const S* start(int64_t j, int64_t d) const { return p.bias && d == 0 ? p.bias + j : nullptr; }
  void finish() const {
    for (int64_t i = i0; !direct && i < i1; ++i)
      p.kernels.convert(at + (i - i0) * ld, j1 - j0, p.c_at(i, j0), p.C.dtype, p.accumulate);
  }
};

// Panels of A, one per (block of k, tile of rows), for tiles [first, last); each has room for what packing writes past
// its end.
template <class S>
struct RowPanels {
  const GemmProblem<S>& p;
  int64_t first, count, pitch;
  S* data;

  RowPanels(const GemmProblem<S>& p, int64_t first, int64_t last, S* data)
      : p(p), first(first), count(last - first), pitch(round_up(p.kernels.rows * p.longest() + kSlack)), data(data) {}
  int64_t row(int64_t r) const { return p.rows()[first + r] - p.rows()[first]; }
  int height(int64_t r) const { return static_cast<int>(row(r + 1) - row(r)); }
  S* panel(int64_t d, int64_t r) const { return data + (d * count + r) * pitch; }
  void pack(const Depth& k, int64_t d, int64_t r) const {
    p.kernels.pack(p.A, p.M, p.rows()[first + r], height(r), k.first, k.depth, height(r), panel(d, r));
  }
};

// Tiles of rows [r0, r1) of columns [j0, j1), from panels of B that begin at column `origin`.
template <class S>
void block(const GemmProblem<S>& p, int64_t r0, int64_t r1, int64_t j0, int64_t j1, const S* panels, int64_t origin,
           S* a, S* scratch) {
  const auto& kernels = p.kernels;
  const int64_t cols = kernels.cols, pitch = p.pass().steps;
  const BlockSums<S> sums(p, p.rows()[r0], p.rows()[r1], j0, j1, scratch);
  const RowPanels<S> A(p, r0, r1, a);
  for (int64_t d = p.d0; d < p.d1; ++d) {
    const Depth k = p.depth(d);
    for (int64_t r = 0; r < A.count; ++r) A.pack(k, 0, r);
    for (int64_t j = j0; j < j1; j += cols)
      for (int64_t r = 0; r < A.count; ++r)
        kernels.tile(A.height(r), static_cast<int>(std::min(cols, j1 - j)), k.steps, A.panel(0, r),
                     panels + (j - origin) * pitch + k.at * cols, cols, sums.at + A.row(r) * sums.ld + (j - j0),
                     sums.ld, sums.start(j, d), d > 0 || sums.accumulate);
  }
  sums.finish();
}

template <class S>
void run(const GemmProblem<S>& p) {
  const auto& kernels = p.kernels;
  const int64_t rows = kernels.rows, cols = kernels.cols, size = sizeof(S), pitch = p.pass().steps;
  const int threads = threads_for(p.M, p.N, p.K);
  const int64_t panels = ceil_div(p.N, cols), row_tiles = p.rows().count;
  const Split outer = split(panels, std::max<int64_t>(1, kPanelBytes / (std::max<int64_t>(1, pitch) * cols * size)));
  const int64_t widest = ceil_div(panels, outer.count);
  // Blocks of C: A's pack fits L2, and there are several for each thread, where there are as many tiles.
  int64_t tiles = std::min(std::max<int64_t>(1, kBlockBytes / (p.longest() * rows * size)), row_tiles);
  int64_t width = std::min(widest, kBlockCols / cols);
  while (threads > 1 && ceil_div(row_tiles, tiles) * ceil_div(widest, width) < kBlocksPerThread * threads &&
         tiles * width > 4) {
    // Rows first: columns in two parts pack A twice.
    int64_t& longer = tiles > kLeastTiles || width == 1 ? tiles : width;
    longer = ceil_div(longer, 2);
  }
  const Split row_blocks = split(row_tiles, tiles);
  const int64_t a_size = tiles * RowPanels<S>(p, 0, 0, nullptr).pitch;
  const int64_t own = round_up(a_size + (p.narrow() ? tiles * rows * width * cols : 0));
  const int64_t shared = round_up(widest * cols * pitch);
  S* const packed = workspace<S>(shared + threads * own);
#pragma omp parallel num_threads(threads)
  {
    S* const a = packed + shared + omp_get_thread_num() * own;
    for (int64_t o = 0; o < outer.count; ++o) {
      const int64_t first = outer[o], last = outer[o + 1], origin = first * cols;
#pragma omp for schedule(static)
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t j = panel * cols;
        kernels.pack(p.B, p.N, j, static_cast<int>(std::min(cols, p.N - j)), p.pass().first, p.pass().depth,
                     static_cast<int>(cols), packed + (j - origin) * pitch);
      }
      const Split col_blocks = split(last - first, width);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < row_blocks.count * col_blocks.count; ++item) {
        const int64_t r = item / col_blocks.count, c = item % col_blocks.count;
        block(p, row_blocks[r], row_blocks[r + 1], (first + col_blocks[c]) * cols,
              std::min(p.N, (first + col_blocks[c + 1]) * cols), packed, origin, a, a + a_size);
      }
    }
  }
}

// --- few rows: A is packed once per pass, and a block of k of it stays in L2; a panel of B is packed, used, forgotten
// ---

// Columns [j0, j1). With one tile of rows, B is used where it lies.
template <class S>
void columns(const GemmProblem<S>& p, int64_t j0, int64_t j1, const RowPanels<S>& A, S* b, S* scratch) {
  const auto& kernels = p.kernels;
  const int64_t cols = kernels.cols;
  const BlockSums<S> sums(p, 0, p.M, j0, j1, scratch);
  const bool in_place = A.count == 1 && p.B.transposed && accum_of(p.B.dtype) == p.B.dtype;
  for (int64_t d = p.d0; d < p.d1; ++d) {
    const Depth k = p.depth(d);
    for (int64_t j = j0, step; j < j1; j += step) {
      step = in_place && p.M == 1 && j1 - j >= kernels.wide ? kernels.wide : cols;
      const int width = static_cast<int>(std::min(step, j1 - j));
      const S* from = b;
      int64_t ldb = cols;
      if (in_place && width == step) {
        from = static_cast<const S*>(p.B.data) + k.first * p.B.ld + j;
        ldb = p.B.ld;
      } else {
        kernels.pack(p.B, p.N, j, width, k.first, k.depth, static_cast<int>(cols), b);
      }
      for (int64_t r = 0; r < A.count; ++r)
        kernels.tile(A.height(r), width, k.steps, A.panel(d - p.d0, r), from, ldb,
                     sums.at + A.row(r) * sums.ld + (j - j0), sums.ld, sums.start(j, d), d > 0 || sums.accumulate);
    }
  }
  sums.finish();
}

// A row or few, and B's columns contiguous: inner products, nothing is packed but a's rows.
template <class S>
void run_dots(const GemmProblem<S>& p) {
  const auto& kernels = p.kernels;
  const int threads = threads_for(p.M, p.N, p.K);
  const Split blocks = split(p.N, std::clamp<int64_t>(p.N / (4 * threads) / 16 * 16, 16, 1024));
  const int64_t pitch = round_up(p.K + kSlack), longest = ceil_div(p.N, blocks.count);
  const int64_t own = p.narrow() ? round_up(p.M * longest) : 0;
  const Split depths = split(p.K, kDotDepth);
  // Lines of a: of half-sized elements, where those are multiplied.
  S* const lines = workspace<S>(p.M * pitch + threads * own);
  const int64_t size = static_cast<int64_t>(sizeof(S)) / kernels.step;
  char* const a = reinterpret_cast<char*>(lines);
  for (int64_t i = 0; i < p.M; ++i) kernels.line(p.A, i, p.K, a + i * pitch * size);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t c = 0; c < blocks.count; ++c) {
    const int64_t j0 = blocks[c], j1 = blocks[c + 1];
    const BlockSums<S> sums(p, 0, p.M, j0, j1, lines + p.M * pitch + omp_get_thread_num() * own);
    for (int64_t d = 0; d < depths.count; ++d) {
      const int64_t k = depths[d];
      kernels.dots(static_cast<int>(p.M), j1 - j0, depths[d + 1] - k, a + k * size, pitch,
                   {.data = at(p.B.data, j0 * p.B.ld + k, p.B.dtype), .dtype = p.B.dtype, .ld = p.B.ld}, sums.at,
                   sums.ld, d > 0 || sums.accumulate);
    }
    for (int64_t i = 0; p.bias && i < p.M; ++i)
      kernels.convert(p.bias + j0, j1 - j0, sums.at + i * sums.ld, p.own(), true);
    sums.finish();
  }
}

// Packing B costs more than reading it once for every four rows: up to so many.
template <class S>
bool is_short(const GemmProblem<S>& p) {
  return !p.B.transposed && p.M <= (p.K < 512 ? 8 : 24);
}

template <class S>
bool is_flat(const GemmProblem<S>& p) {
  return p.M * p.longest() * static_cast<int64_t>(sizeof(S)) <= kBlockBytes;
}

template <class S>
void run_flat(const GemmProblem<S>& p) {
  const auto& kernels = p.kernels;
  const int threads = threads_for(p.M, p.N, p.K);
  const int64_t cols = kernels.cols, panels = ceil_div(p.N, cols), depths = p.d1 - p.d0;
  const Split blocks = split(panels, std::clamp<int64_t>(panels / (kBlocksPerThread * threads), 1, 8));
  const int64_t a_size = depths * p.rows().count * RowPanels<S>(p, 0, 0, nullptr).pitch;
  const int64_t b_size = round_up(p.longest() * cols);
  const int64_t own = b_size + (p.narrow() ? round_up(p.M * ceil_div(panels, blocks.count) * cols) : 0);
  S* const packed = workspace<S>(a_size + threads * own);
  const RowPanels<S> A(p, 0, p.rows().count, packed);
#pragma omp parallel num_threads(threads)
  {
    S* const b = packed + a_size + omp_get_thread_num() * own;
#pragma omp for schedule(static) collapse(2)
    for (int64_t d = 0; d < depths; ++d)
      for (int64_t r = 0; r < A.count; ++r) A.pack(p.depth(p.d0 + d), d, r);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < blocks.count; ++c)
      columns(p, blocks[c] * cols, std::min(p.N, blocks[c + 1] * cols), A, b, b + b_size);
  }
}

template <class S>
void gemm_in(const GemmKernels<S>& kernels, int64_t M, int64_t N, int64_t K, Matrix A, Matrix B, MutableView C,
             bool accumulate, const void* bias) {
  GemmProblem<S> p{.kernels = kernels,
                   .M = M,
                   .N = N,
                   .K = K,
                   .A = A,
                   .B = B,
                   .C = C,
                   .accumulate = accumulate,
                   .bias = static_cast<const S*>(bias)};
  p.B.transposed = !B.transposed;
  if (is_short(p)) return run_dots(p);
  // Deep products go in passes over k; a narrow result then needs a wide one to be summed in.
  const bool flat = is_flat(p);
  const int64_t blocks = flat ? std::max<int64_t>(1, kFlatElements / (M * kDepth)) : kPassBlocks;
  const Split passes = split(p.depths().count, blocks);
  const bool narrow = p.narrow() && passes.count > 1;
  const Buffer<S> wide(narrow ? M * N : 0);
  if (narrow) {
    p.C = {.data = wide.get(), .dtype = p.own(), .ld = N};
    p.accumulate = false;
  }
  for (int64_t pass = 0; pass < passes.count; ++pass) {
    p.d0 = passes[pass];
    p.d1 = passes[pass + 1];
    flat ? run_flat(p) : run(p);
  }
  if (narrow)
    for (int64_t i = 0; i < M; ++i)
      kernels.convert(wide.get() + i * N, N, at(C.data, i * C.ld, C.dtype), C.dtype, accumulate);
}

}  // namespace

bool gemm_multiplies_bf16() {
#if defined(__x86_64__)
  return LLMKERN_SELECT(gemm).pairs.tile && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void convert(const void* from, int64_t n, void* to, DType dtype) {
  const auto& table = LLMKERN_SELECT(gemm);
  parallel_for(n, kConvertGrain, [&](int64_t begin, int64_t end) {
    char* const out = at(to, begin, dtype);
    if (dtype == DType::f64)
      table.f64.convert(static_cast<const double*>(from) + begin, end - begin, out, dtype, false);
    else
      table.f32.convert(static_cast<const float*>(from) + begin, end - begin, out, dtype, false);
  });
}

void gemm(int64_t M, int64_t N, int64_t K, Matrix A, Matrix B, MutableView C, bool accumulate, const void* bias) {
  const bool wide = A.dtype == DType::f64;
  if (wide != (B.dtype == DType::f64) || wide != (C.dtype == DType::f64))
    throw std::invalid_argument("gemm: float64 cannot be mixed with other dtypes; convert the operands first");
  if (M <= 0 || N <= 0) return;
  if (N == 1 && C.ld == 1 && !bias) {
    // A column is a row of the transposed product.
    std::swap(M, N);
    std::swap(A, B);
    A.transposed = !A.transposed;
    B.transposed = !B.transposed;
    C.ld = N;
  }
  const auto& table = LLMKERN_SELECT(gemm);
  if (wide)
    gemm_in(table.f64, M, N, K, A, B, C, accumulate, bias);
  else if (A.dtype == DType::bf16 && B.dtype == DType::bf16 && gemm_multiplies_bf16())
    gemm_in(table.pairs, M, N, K, A, B, C, accumulate, bias);
  else
    gemm_in(table.f32, M, N, K, A, B, C, accumulate, bias);
}

}  // namespace llmkern::cpu
