#include "core/gemm.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// A tile's sums fill the register file but for the row of b and one broadcast; rows <= lanes, so that a panel
// of a is packed with one vector per k.
template <class S>
constexpr int tile_rows() {
  constexpr bool narrow = sizeof(S) == 4;
  if (kVectorBytes == 64) return narrow ? 14 : 8;
  if (kVectorBytes == 32) return narrow ? 6 : 4;
  return kLanes<S>;
}
template <class S>
inline constexpr int kRows = tile_rows<S>();
template <class S>
inline constexpr int kVectors = kVectorBytes == 16 || sizeof(S) == 4 ? 2 : 3;
// Of the only row of a: reads as much of each row of b as it can.
inline constexpr int kWide = 8;

// --- tiles ---

// sum + b * a; kPairs: each lane holds two bf16, and two products are added.
template <class S, bool kPairs>
static inline Vec<S> multiply_add(Vec<S> sum, Vec<S> b, const S* a) {
#if defined(__AVX512F__)
  if constexpr (kPairs) return dot_pairs(sum, b, splat_bits(a));
#endif
  return sum + b * *a;
}

template <class S, bool kPairs, int R, int V>
void tile(int cols, int64_t depth, const S* a, const S* b, int64_t ldb, S* c, int64_t ldc, const S* start,
          bool accumulate) {
  constexpr int L = kLanes<S>;
  const int last = cols - (V - 1) * L;
  // C comes from L3 or memory; it is on its way while the sums are taken.
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) __builtin_prefetch(c + i * ldc + v * L, 1);
  Vec<S> sum[R][V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    Vec<S> first{};
    if (start) first = v < V - 1 || last == L ? load<S>(start + v * L) : load<S>(start + v * L, last, S{});
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][v] = first;
  }
  for (int64_t k = 0; k < depth; ++k, a += R, b += ldb) {
    Vec<S> row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = load<S>(b + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[i][v] = multiply_add<S, kPairs>(sum[i][v], row[v], a + i);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    S* to = c + i * ldc;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      if (v < V - 1 || last == L)
        store(to + v * L, accumulate ? load<S>(to + v * L) + sum[i][v] : sum[i][v]);
      else
        store(to + v * L, accumulate ? load<S>(to + v * L, last, S{}) + sum[i][v] : sum[i][v], last);
    }
  }
}

template <class S>
using Tile = void (*)(int, int64_t, const S*, const S*, int64_t, S*, int64_t, const S*, bool);

// tile<S, kPairs, rows, vectors> for rows <= R and vectors <= V, found at run time.
template <class S, bool kPairs, int R, int V>
Tile<S> find_tile(int rows, int vectors) {
  if constexpr (R > 1)
    if (rows < R) return find_tile<S, kPairs, R - 1, V>(rows, vectors);
  if constexpr (V > 1)
    if (vectors < V) return find_tile<S, kPairs, R, V - 1>(rows, vectors);
  return &tile<S, kPairs, R, V>;
}

template <class S, bool kPairs>
void any_tile(int rows, int cols, int64_t depth, const S* a, const S* b, int64_t ldb, S* c, int64_t ldc, const S* start,
              bool accumulate) {
  if (cols == kWide * kLanes<S>) return tile<S, kPairs, 1, kWide>(cols, depth, a, b, ldb, c, ldc, start, accumulate);
  const int vectors = (cols + kLanes<S> - 1) / kLanes<S>;
  find_tile<S, kPairs, kRows<S>, kVectors<S>>(rows, vectors)(cols, depth, a, b, ldb, c, ldc, start, accumulate);
}

// --- packing ---

// Perfect shuffles: log2(L) rounds of them transpose L vectors.
template <class V, class I, int L>
static inline void interleave(V a, V b, V& low, V& high) {
#if defined(__clang__)
  for (int i = 0; i < L / 2; ++i) {
    low[2 * i] = a[i];
    low[2 * i + 1] = b[i];
    high[2 * i] = a[L / 2 + i];
    high[2 * i + 1] = b[L / 2 + i];
  }
#else
  I low_of, high_of;
  for (int i = 0; i < L; ++i) low_of[i] = i / 2 + i % 2 * L, high_of[i] = low_of[i] + L / 2;
  low = __builtin_shuffle(a, b, low_of), high = __builtin_shuffle(a, b, high_of);
#endif
}

// Integers as wide as S: the index of a shuffle.
typedef long long vi64 __attribute__((vector_size(kVectorBytes)));
template <class S>
using Index = std::conditional_t<sizeof(S) == 8, vi64, vi32>;

template <class S>
static inline void transpose(Vec<S> (&rows)[kLanes<S>]) {
  constexpr int L = kLanes<S>;
#pragma GCC unroll 8
  for (int round = 1; round < L; round *= 2) {
    Vec<S> next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i)
      interleave<Vec<S>, Index<S>, L>(rows[i], rows[i + L / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// A vector whose lane i is the sum of the lanes of rows[i]: the shuffles of a transposition, but each round adds up
// what belongs together and leaves half as many vectors.
template <class S, int N = kLanes<S>>
static inline Vec<S> sum_lanes(Vec<S>* rows) {
  if constexpr (N == 1) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      Vec<S> low, high;
      interleave<Vec<S>, Index<S>, kLanes<S>>(rows[i], rows[i + N / 2], low, high);
      rows[i] = low + high;
    }
    return sum_lanes<S, N / 2>(rows);
  }
}

// Memory runs along k, in lines `pitch` bytes apart: L lines by L steps are transposed in registers. Lines past the
// n-th repeat it.
template <class S, class T>
void pack_lines(const void* x, int64_t pitch, int n, int64_t depth, int stride, S* to) {
  constexpr int L = kLanes<S>;
  for (int i = 0; i < stride; i += L, to += L) {
    const T* line[L];
    for (int l = 0; l < L; ++l)
      line[l] = reinterpret_cast<const T*>(static_cast<const char*>(x) + (i + l < n ? i + l : n - 1) * pitch);
    Vec<S> block[L];
    int64_t k = 0;
    for (; k + L <= depth; k += L) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        __builtin_prefetch(line[l] + k + 8 * L);
        block[l] = load<S>(line[l] + k);
      }
      transpose<S>(block);
#pragma GCC unroll 16
      for (int step = 0; step < L; ++step) store(to + (k + step) * stride, block[step]);
    }
    const int rest = static_cast<int>(depth - k);
    if (rest == 0) continue;
    for (int l = 0; l < L; ++l) block[l] = load<S>(line[l] + k, rest, S{});
    transpose<S>(block);
    for (int step = 0; step < rest; ++step) store(to + (k + step) * stride, block[step]);
  }
}

// Memory runs along the panel's rows: a copy. `whole`: reading past n, up to whole vectors, stays in memory.
template <class S, class T>
void pack_rows(const T* x, int64_t ld, int n, bool whole, int64_t depth, int stride, S* to) {
  constexpr int L = kLanes<S>;
  for (int64_t k = 0; k < depth; ++k, x += ld, to += stride)
    for (int i = 0; i < stride; i += L) {
      if (whole || n - i >= L)
        store(to + i, load<S>(x + i));
      else
        store(to + i, n > i ? load<S>(x + i, n - i, S{}) : Vec<S>{});
    }
}

template <class S>
void pack(Matrix X, int64_t extent, int64_t first, int n, int64_t k0, int64_t depth, int stride, S* to) {
  constexpr int L = kLanes<S>;
  visit(X.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(Accum<T>) == sizeof(S)) {
      const T* x = static_cast<const T*>(X.data);
      if (X.transposed)
        pack_rows(x + k0 * X.ld + first, X.ld, n, first + (stride + L - 1) / L * L <= extent, depth, stride, to);
      else
        pack_lines<S, T>(x + first * X.ld + k0, X.ld * static_cast<int64_t>(sizeof(T)), n, depth, stride, to);
    }
  });
}

template <class S>
void line(Matrix X, int64_t i, int64_t depth, void* to) {
  pack<S>(X, 0, i, 1, 0, depth, 1, static_cast<S*>(to));
}

#if defined(__AVX512F__)
// Panels of pairs: an element is X[i][k] and X[i][k + 1], k even; past an odd depth stands a zero.
void pack_pairs(Matrix X, int64_t extent, int64_t first, int n, int64_t k0, int64_t depth, int stride, float* to) {
  const int64_t whole = depth / 2;
  const bf16* x = static_cast<const bf16*>(X.data) + (X.transposed ? k0 * X.ld + first : first * X.ld + k0);
  if (!X.transposed) {
    // Pairs lie in memory as they are wanted: a transposition of 32-bit elements.
    pack_lines<float, float>(x, X.ld * 2, n, whole, stride, to);
    for (int i = 0; depth % 2 && i < stride; ++i) {
      const uint32_t bits = x[(i < n ? i : n - 1) * X.ld + depth - 1].bits;
      to[whole * stride + i] = bits_as<float>(bits);
    }
    return;
  }
  constexpr int L = kLanes<float>;
  const bool inside = first + (stride + L - 1) / L * L <= extent;
  for (int64_t k = 0; k < depth; k += 2, x += 2 * X.ld, to += stride)
    for (int i = 0; i < stride; i += L) {
      const auto row = [&](const bf16* p) {
        if (inside || n - i >= L) return bits_as<vu32>(load<float>(p + i));
        return n > i ? bits_as<vu32>(load<float>(p + i, n - i, 0.f)) : vu32{};
      };
      const vu32 high = k + 1 < depth ? row(x + X.ld) : vu32{};
      store(to + i, bits_as<vf32>(row(x) >> 16 | high));
    }
}
#endif

// --- inner products ---

// sum + the products of what lies at a and b, a vector's worth from each: in S, or twice as many in bf16.
template <class S, class A, class T>
static inline Vec<S> dot(Vec<S> sum, const A* a, const T* b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 2)
    return dot_pairs(sum, load<S>(reinterpret_cast<const S*>(a)), load<S>(reinterpret_cast<const S*>(b)));
#endif
  return sum + load<S>(a) * load<S>(b);
}
// The same for the first n.
template <class S, class A, class T>
static inline Vec<S> dot(Vec<S> sum, const A* a, const T* b, int n) {
  if constexpr (sizeof(A) == 2) {
    A x[2 * kLanes<S>] = {};
    T y[2 * kLanes<S>] = {};
    memcpy(x, a, n * sizeof(A));
    memcpy(y, b, n * sizeof(T));
    return dot<S>(sum, x, y);
  }
  return sum + load<S>(a, n, S{}) * load<S>(b, n, S{});
}

// c (R, lanes) = the products of R rows of a with L lines of b; `line` names them. Their sums lie across
// lanes and are brought together row by row.
template <class S, int R, class A, class T>
void dots_of(const T* const* line, int64_t depth, const A* a, int64_t lda, Vec<S>* c) {
  constexpr int L = kLanes<S>, kLines = L < 4 ? L : 4, kStep = L * static_cast<int>(sizeof(S) / sizeof(A));
  Vec<S> sum[R][L];
  for (int l = 0; l < L; l += kLines) {
    Vec<S> part[R][kLines] = {};
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep)
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) part[i][j] = dot<S>(part[i][j], a + i * lda + k, line[l + j] + k);
    const int rest = static_cast<int>(depth - k);
    for (int j = 0; rest > 0 && j < kLines; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) part[i][j] = dot<S>(part[i][j], a + i * lda + k, line[l + j] + k, rest);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) sum[i][l + j] = part[i][j];
  }
  for (int i = 0; i < R; ++i) c[i] = sum_lanes<S>(sum[i]);
}

template <class S, class A, class T>
auto find_dots(int rows) {
  if (rows == 1) return &dots_of<S, 1, A, T>;
  if (rows == 2) return &dots_of<S, 2, A, T>;
  return rows == 3 ? &dots_of<S, 3, A, T> : &dots_of<S, 4, A, T>;
}

template <class S, class A, class T>
void dots_with(int rows, int64_t lines, int64_t depth, const A* a, int64_t lda, const T* x, int64_t ldb, S* c,
               int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<S>;
  for (int64_t j = 0; j < lines; j += L) {
    const int n = lines - j < L ? static_cast<int>(lines - j) : L;
    const T* line[L];
    for (int l = 0; l < L; ++l) line[l] = x + (j + (l < n ? l : n - 1)) * ldb;
    for (int i = 0; i < rows; i += 4) {
      Vec<S> y[4];
      find_dots<S, A, T>(rows - i)(line, depth, a + i * lda, lda, y);
      for (int r = 0; r < 4 && i + r < rows; ++r) {
        S* to = c + (i + r) * ldc + j;
        store(to, accumulate ? load<S>(to, n, S{}) + y[r] : y[r], n);
      }
    }
  }
}

template <class S>
void dots(int rows, int64_t lines, int64_t depth, const void* a, int64_t lda, View b, S* c, int64_t ldc,
          bool accumulate) {
  visit(b.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(Accum<T>) == sizeof(S))
      dots_with(rows, lines, depth, static_cast<const S*>(a), lda, static_cast<const T*>(b.data), b.ld, c, ldc,
                accumulate);
  });
}

#if defined(__AVX512F__)
void line_of_pairs(Matrix X, int64_t i, int64_t depth, void* to) {
  const bf16* const x = static_cast<const bf16*>(X.data);
  for (int64_t k = 0; k < depth; ++k) static_cast<bf16*>(to)[k] = x[X.transposed ? k * X.ld + i : i * X.ld + k];
}

void dots_of_pairs(int rows, int64_t lines, int64_t depth, const void* a, int64_t lda, View b, float* c, int64_t ldc,
                   bool accumulate) {
  dots_with(rows, lines, depth, static_cast<const bf16*>(a), lda, static_cast<const bf16*>(b.data), b.ld, c, ldc,
            accumulate);
}
#endif

// --- conversion ---

template <class S>
void convert(const S* from, int64_t n, void* out, DType dtype, bool accumulate) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(Accum<T>) == sizeof(S)) {
      T* const to = static_cast<T*>(out);
      for_vectors<S>(n, [&](int64_t i, int lanes) {
        const Vec<S> x = load_n<S>(from + i, lanes);
        store_n(to + i, accumulate ? load_n<S>(to + i, lanes) + x : x, lanes);
      });
    }
  });
}

template <class S>
inline constexpr GemmKernels<S> kKernels{.step = 1,
                                         .rows = kRows<S>,
                                         .cols = kVectors<S> * kLanes<S>,
                                         .wide = kWide * kLanes<S>,
                                         .pack = &pack<S>,
                                         .tile = &any_tile<S, false>,
                                         .line = &line<S>,
                                         .dots = &dots<S>,
                                         .convert = &convert<S>};

#if defined(__AVX512F__)
inline constexpr GemmKernels<float> kPairKernels{.step = 2,
                                                 .rows = kRows<float>,
                                                 .cols = kVectors<float> * kLanes<float>,
                                                 .wide = kWide * kLanes<float>,
                                                 .pack = &pack_pairs,
                                                 .tile = &any_tile<float, true>,
                                                 .line = &line_of_pairs,
                                                 .dots = &dots_of_pairs,
                                                 .convert = &convert<float>};
#else
inline constexpr GemmKernels<float> kPairKernels{};
#endif

}  // namespace

extern const GemmTable gemm{.f32 = kKernels<float>, .f64 = kKernels<double>, .pairs = kPairKernels};

}  // namespace llmkern::cpu::LLMKERN_ISA
